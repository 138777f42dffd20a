"""Puts finished files where readers look for them, so that a crash at any moment leaves no half artifact.

In: files in a temporary folder, and what the manifest says of them. Out: an artifact's folder, or a new part
in it. The caller holds the artifact's lock.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from heapr.artifacts import MANIFEST
from heapr.files import fsync, write_json


@contextmanager
def empty_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside an artifact's; those that killed processes left are removed first."""
    for leftover in path.parent.glob(f".{path.name}.tmp-*"):
        shutil.rmtree(leftover)
    temporary = path.parent / f".{path.name}.tmp-{os.getpid()}"
    temporary.mkdir()
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def publish(temporary: Path, path: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest into a temporary folder and rename the folder into place."""
    write_json(temporary / MANIFEST, manifest)
    fsync(temporary)
    aside = path.parent / f".{path.name}.tmp-{os.getpid()}-old"
    if path.exists():  # a damaged artifact; its readers find nothing for a moment
        os.rename(path, aside)
    os.rename(temporary, path)
    fsync(path.parent)
    shutil.rmtree(aside, ignore_errors=True)


def add_part(part: str, temporary: Path, path: Path, entry: Mapping[str, Any]) -> None:
    """Move the files in a temporary folder into an artifact's, then enter them in its manifest.

    Args:
        part: name of the part; its files count once the manifest has an entry for it.
        temporary, path: the two folders.
        entry: what the manifest says of the part.
    """
    manifest = json.loads((path / MANIFEST).read_text())
    is_damaged = bool(manifest["parts"].pop(part, None))
    if is_damaged:
        write_json(path / MANIFEST, manifest)
    for file in sorted(temporary.iterdir()):
        place = path / file.name
        if place.is_dir():
            shutil.rmtree(place)
        os.replace(file, place)
    fsync(path)
    manifest["parts"][part] = entry
    write_json(path / MANIFEST, manifest)
    fsync(path)
