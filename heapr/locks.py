"""One process at a time for each artifact, in a folder that several users may share.

In: an artifact's folder. Out: context managers that hold its lock.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from heapr.files import readable_by_umask

logger = logging.getLogger(__name__)


def lock_of(path: Path) -> FileLock:
    """The lock of the artifact in a folder; the operating system frees it when its holder dies.

    A lock file has no content, so everybody in the folder's group may take it, whatever the umask of the
    user who made it.
    """
    return FileLock(path.parent / f".{path.name}.lock", mode=readable_by_umask(0o666) | 0o660)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of the artifact in a folder; log a line if that means waiting."""
    lock = lock_of(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.info("%s %s: another process is making it, waiting", path.parent.name, path.name)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
