"""Remembers the hashes of large files, so that weights are read once and not at every start.

In: a file, and a folder for the hashes. Out: its sha256. A file is recognized by path, size, time of
modification, ctime, inode and device. No copying tool can set the ctime; a clock can be set back, and so a
remembered hash is believed for `BELIEVED_DAYS` only.
"""

from __future__ import annotations

import hashlib
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from heapr.files import hash_file, write_text
from heapr.sealed import DamagedError, read_sealed, sealed_text

BELIEVED_DAYS = 30
# A file that was changed a moment ago may be changed again without any of its times being different.
SETTLED_SECONDS = 2.0


def hash_file_once(path: Path, memory: Path) -> str:
    """As `hash_file`, but remembers the hash in a folder.

    The folder may be damaged, full or read-only: the file is then read again.
    """
    place = path.resolve()
    state = state_of(path)
    name = hashlib.sha256(str(place).encode()).hexdigest()
    record = memory / f"{name}.json"
    remembered = _remembered(record, str(place), state)
    if remembered is not None:
        return remembered
    digest = hash_file(path)
    if is_settled(state) and state_of(path) == state:
        content = {"file": str(place), "state": state, "time": time.time(), "sha256": digest}
        with suppress(OSError):
            memory.mkdir(parents=True, exist_ok=True)
            write_text(record, sealed_text(content))
    return digest


def state_of(path: Path) -> list[int]:
    """Everything by which a file's change shows without reading it."""
    stat: os.stat_result = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev]


def is_settled(state: list[int]) -> bool:
    """Whether the file has not been changed for so long that any change to come will show in its times."""
    _, modified, changed, *_ = state
    age = time.time() - max(modified, changed) / 1e9
    return age > SETTLED_SECONDS


def _remembered(record: Path, place: str, state: list[int]) -> str | None:
    """The remembered hash; None if there is none that can be believed."""
    try:
        content: dict[str, Any] = read_sealed(record)
        age_days = (time.time() - content["time"]) / (24 * 3600)
        is_same = content["file"] == place and content["state"] == state
        is_believed = is_same and 0 <= age_days < BELIEVED_DAYS
        return content["sha256"] if is_believed and isinstance(content["sha256"], str) else None
    except (OSError, DamagedError, KeyError, TypeError, OverflowError):
        return None
