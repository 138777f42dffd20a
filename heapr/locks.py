"""Locks between processes, on one machine or on a file system that several machines share.

In: a path. Out: a context in which no other process holds the same path, and log lines that say who holds it
while this one waits. The lock is the operating system's (flock), which frees it when its holder dies. On file
systems without flock, filelock falls back to a marker file, and takes over a marker whose process, by host,
boot and start time, is gone. A marker from another host cannot be checked: the log says which file to remove.
"""

from __future__ import annotations

import getpass
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from heapr.errors import ConfigError
from heapr.files import readable_by_umask, write_json

logger = logging.getLogger(__name__)

REMINDER_SECONDS = 600.0  # between two lines about the same wait


@dataclass(frozen=True)
class Holder:
    """Who holds a lock.

    Attributes:
        host, pid, user: of the process.
        since: when it got the lock, local time.
    """

    host: str
    pid: int
    user: str
    since: str

    @classmethod
    def this_process(cls) -> Holder:
        return cls(socket.gethostname(), os.getpid(), _user(), f"{datetime.now():%Y-%m-%d %H:%M:%S}")

    def __str__(self) -> str:
        return f"process {self.pid} of {self.user} on {self.host}, since {self.since}"


@contextmanager
def locked(path: Path, what: str, *, wait_minutes: float | None = None) -> Iterator[None]:
    """Hold the lock of a path; log who holds it if that takes waiting.

    The lock file is readable and writable by the folder's group whatever the umask, because it holds nothing.

    Args:
        path: of the lock file, which stays. The folder exists.
        what: is locked, for the log.
        wait_minutes: after which to give up; None waits as long as it takes.

    Raises:
        ConfigError: it is still held after `wait_minutes`.
    """
    _make_way(path)
    lock = lock_of(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        _wait(lock, what, wait_minutes)
    with held(lock):
        yield


def _make_way(path: Path) -> None:
    """Move aside what is in the place of a lock and cannot be one: a folder, or a link."""
    if path.is_symlink() or (path.exists() and not path.is_file()):
        aside = path.with_name(f"{path.name}.damaged-{datetime.now():%Y-%m-%d_%H-%M-%S-%f}")
        with suppress(FileNotFoundError):  # another process was faster
            path.rename(aside)
            logger.warning("%s is no lock; it is kept as %s", path, aside)


def lock_of(path: Path) -> FileLock:
    return FileLock(path, mode=readable_by_umask(0o666) | 0o660)


@contextmanager
def held(lock: FileLock) -> Iterator[None]:
    """Say who holds a lock that this process has acquired, and release it at the end."""
    holder_file = _holder_file(Path(lock.lock_file))
    try:
        with suppress(OSError):  # tells others who it is; not needed to be right
            write_json(holder_file, asdict(Holder.this_process()))
        yield
    finally:
        with suppress(OSError):
            holder_file.unlink(missing_ok=True)
        lock.release()


def holder_of(path: Path) -> Holder | None:
    """Who holds the lock of a path; None if nobody does, or nobody said so."""
    try:
        fields: dict[str, Any] = json.loads(_holder_file(path).read_text(encoding="utf-8"))
        return Holder(**fields)
    except (OSError, ValueError, TypeError, RecursionError):
        return None


def _wait(lock: FileLock, what: str, wait_minutes: float | None) -> None:
    path = Path(lock.lock_file)
    start = time.monotonic()
    limit = float("inf") if wait_minutes is None else 60 * wait_minutes
    logger.info("%s: waiting for %s", what, _describe(path))
    while True:
        waited = time.monotonic() - start
        if waited >= limit:
            raise ConfigError(
                f"{what} is still locked by {_describe(path)} after {waited / 60:.0f} minutes; wait longer"
                f" with runtime.wait_minutes=..., or remove '{path}' if that process is gone"
            )
        with suppress(Timeout):
            lock.acquire(timeout=min(REMINDER_SECONDS, limit - waited))
            return
        logger.info(
            "%s: still waiting after %.0f minutes for %s; if that machine is gone, remove '%s'",
            what,
            (time.monotonic() - start) / 60,
            _describe(path),
            path,
        )


def _describe(path: Path) -> str:
    holder = holder_of(path)
    return "another process" if holder is None else str(holder)


def _holder_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.holder")


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user id without a name, as in some containers
        return str(os.getuid())
