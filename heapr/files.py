"""Small things about files that several modules need: hashes, and writes that survive a crash."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any


def user_path(path: str) -> Path:
    """A path as the user wrote it, with ~ for the home folder; ~name of a user who is unknown stays as it
    is."""
    return Path(os.path.expanduser(path))  # Path.expanduser raises where the user is unknown


def hash_file(path: Path) -> str:
    """sha256 of a file's content, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def hash_files(folder: Path, paths: Iterable[Path], hash_one: Callable[[Path], str] = hash_file) -> str:
    """sha256 over names and contents of files below a folder, in the order of their paths.

    Args:
        folder: what names count from.
        paths: of the files.
        hash_one: gives the hash of a file.
    """
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{hash_one(path)}\0".encode())
    return digest.hexdigest()


def hash_file_once(path: Path, memory: Path) -> str:
    """As `hash_file`, but remembered in a folder by place, size and times of change: large weights are read
    once. The second time is the system's own, which no copying tool sets back to that of another file."""
    stat = path.stat()
    place = hashlib.sha256(
        f"{path.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}\0{stat.st_ctime_ns}".encode()
    ).hexdigest()
    remembered = memory / f"{place}.json"
    if remembered.is_file():
        return str(json.loads(remembered.read_text())["sha256"])
    digest = hash_file(path)
    memory.mkdir(parents=True, exist_ok=True)
    write_json(remembered, {"file": str(path.resolve()), "sha256": digest})
    return digest


def readable_by_umask(mode: int) -> int:
    """A mode less what the process' umask takes away."""
    umask = os.umask(0)
    os.umask(umask)
    return mode & ~umask


def fsync(path: Path) -> None:
    """Force a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the whole new one, never a part."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write text so that a reader sees the old file or the whole new one, never a part."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    fsync(temporary)
    temporary.rename(path)
