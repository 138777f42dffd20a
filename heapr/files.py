"""Hashes of files, and writes that survive a crash."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from heapr.errors import ConfigError

LONGEST_NAME, LONGEST_PATH = 255, 4095  # bytes that file systems allow
LONGEST_PART = 100  # letters of a name that becomes a part of longer ones


def user_path(path: str) -> Path:
    """A path with ~ and ~name expanded; a ~name that does not exist stays as it is.

    Raises:
        ConfigError: no file can have such a path.
    """
    if not path.strip():
        raise ConfigError("a path is empty; give one, or . for the current folder")
    expanded = os.path.expanduser(path)  # Path.expanduser raises where the user is unknown
    longest = max(len(os.fsencode(name)) for name in expanded.split("/"))
    if longest > LONGEST_NAME or len(os.fsencode(expanded)) > LONGEST_PATH or "\0" in expanded:
        raise ConfigError(
            f"path '{path[:LONGEST_PART]}...' is longer than a path may be ({LONGEST_NAME} bytes a name,"
            f" {LONGEST_PATH} in all), or holds a zero byte; give another"
        )
    return Path(expanded)


def is_name(name: str) -> bool:
    """Whether a name can become a part of names of files and metrics, and stays in its folder."""
    is_plain = name.isprintable() and set(name).isdisjoint("/\\") and name.strip(". ") != ""
    return is_plain and len(name) <= LONGEST_PART


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
        folder: names are relative to it.
        paths: the files.
        hash_one: computes the hash of one file.
    """
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{hash_one(path)}\0".encode())
    return digest.hexdigest()


def readable_by_umask(mode: int) -> int:
    """A mode without the bits that the process's umask removes."""
    umask = os.umask(0)
    os.umask(umask)
    return mode & ~umask


def remove(path: Path) -> None:
    """Remove a file, a link, or a folder with everything in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Make a folder, if it is not there, in place of a file or link, which nobody of ours left there.

    Several processes may do so at once: only `unlink` removes, which spares the folder of another one.
    """
    if folder.is_symlink():
        with suppress(OSError):
            folder.unlink()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        with suppress(OSError):
            folder.unlink()
        folder.mkdir(parents=True, exist_ok=True)


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
    try:
        temporary.write_text(text, encoding="utf-8")
        fsync(temporary)
        temporary.rename(path)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
