"""What runs leave in the store besides artifacts: scratch, and what killed processes did not finish.

In: the store's folder. Out: names, and less of them. What is in use, by its lock, is left alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from filelock import Timeout

from heapr.files import remove
from heapr.locks import lock_of
from heapr.sealed import DamagedError
from heapr.store.manifest import MissingError, trusted_manifest
from heapr.store.publishing import lock_path

SCRATCH_DAYS = 14  # scratch that is unchanged for longer counts as abandoned
TEXT_DAYS = 1  # so does a temporary copy of a small file
DAY = 24 * 3600  # seconds


def scratch_of(path: Path, part: str) -> Path:
    """Folder for intermediate results of an artifact or a part."""
    return path.parent / f".{path.name}.scratch-{part or 'whole'}"


def damaged_copies(root: Path) -> list[Path]:
    """What was damaged and has been moved aside."""
    return sorted(root.glob("*/.*.damaged-*"))


def remove_leftovers(root: Path) -> list[Path]:
    """Remove scratch of what is finished, or that nothing has changed for `SCRATCH_DAYS`, and temporary files
    and names of holders of ended processes.

    Returns:
        what was removed.
    """
    removed = []
    for leftover in _leftovers(root):
        path = leftover.parent / leftover.name.split(".")[1]
        # Skip what is in use, belongs to another user or is gone by now.
        with suppress(OSError, Timeout), lock_of(lock_path(path)).acquire(timeout=0):
            if _is_abandoned(leftover, path):
                remove(leftover)
                removed.append(leftover)
    return removed + _remove_old_texts(root)


def _leftovers(root: Path) -> Iterator[Path]:
    for kind in ("scratch-*", "tmp-*", "lock.holder"):
        yield from root.glob(f"[!.]*/.[!.]*.{kind}")


def _is_abandoned(leftover: Path, path: Path) -> bool:
    """Whether nobody will go on with what lies beside an artifact's folder.

    The artifact's lock is held: all but scratch belongs to whoever holds it.
    """
    if ".scratch-" not in leftover.name:
        return True
    if leftover in [scratch_of(path, part) for part in _finished(path)]:
        return True
    return _last_change(leftover) < time.time() - SCRATCH_DAYS * DAY


def _finished(path: Path) -> list[str]:
    """The parts of an artifact, and the empty name for itself, if it is there."""
    try:
        return ["", *trusted_manifest(path)["parts"]]
    except (MissingError, DamagedError, OSError):
        return []


def _remove_old_texts(root: Path) -> list[Path]:
    """Remove what a process left that was killed while it replaced a holder's name or a remembered hash."""
    removed = []
    limit = time.time() - TEXT_DAYS * DAY
    for temporary in [*root.glob("*/..*.holder.tmp-*"), *root.glob(".*/.*.json.tmp-*")]:
        with suppress(OSError):
            if temporary.stat().st_mtime < limit:
                remove(temporary)
                removed.append(temporary)
    return removed


def _last_change(folder: Path) -> float:
    entries = [folder, *folder.rglob("*")]
    return max(entry.lstat().st_mtime for entry in entries)
