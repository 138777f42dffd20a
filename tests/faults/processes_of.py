"""What a process and those that it started hold: memory, files, threads; read from /proc."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple


class Held(NamedTuple):
    """What one process holds.

    Attributes:
        memory: resident, in bytes.
        files: open ones.
        threads: running ones.
    """

    memory: int
    files: int
    threads: int


def processes_of(pid: int) -> list[int]:
    """A process and all that it started, directly or not, as far as they are alive."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ValueError):
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                parents[int(folder.name)] = int(parent)
    found = [pid] if pid in parents else []
    for process in found:  # which grows meanwhile
        found += [child for child, parent in parents.items() if parent == process]
    return found


def held_by(pid: int) -> Held | None:
    """What a process holds; None if it is gone."""
    folder = Path("/proc") / str(pid)
    with suppress(OSError, ValueError):
        memory = int((folder / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        files = len(list((folder / "fd").iterdir()))
        threads = len(list((folder / "task").iterdir()))
        return Held(memory, files, threads)
    return None
