"""Puts finished files where readers look for them, so that a crash at any moment leaves no half artifact.

In: files in a temporary folder, and what the manifest says of them. Out: an artifact's folder, or a new part
in it; what was damaged is moved aside and never deleted. The caller holds the artifact's lock. Temporary
files lie beside an artifact's folder, never in it.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from heapr.artifacts import MANIFEST
from heapr.files import fsync, remove
from heapr.sealed import sealed_text
from heapr.store.contents import contents_of
from heapr.store.manifest import NEXT, describe, entry_of

logger = logging.getLogger(__name__)


def lock_path(path: Path) -> Path:
    """Lock of the artifact in a folder."""
    return path.parent / f".{path.name}.lock"


def temporary_paths(path: Path) -> list[Path]:
    """Temporary files and folders of an artifact, which are nobody's if its lock is free."""
    return list(path.parent.glob(f".{path.name}.tmp-*"))


@contextmanager
def empty_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside an artifact's; those that killed processes left are removed first."""
    for leftover in temporary_paths(path):
        remove(leftover)
    temporary = _temporary(path)
    temporary.mkdir()
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def publish(temporary: Path, path: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest into a temporary folder and rename the folder into place, where nothing is."""
    file = temporary / MANIFEST
    file.write_text(sealed_text(manifest), encoding="utf-8")
    fsync(file)
    fsync(temporary)
    os.rename(temporary, path)
    fsync(path.parent)


def add_part(
    part: str, temporary: Path, path: Path, *, manifest: Mapping[str, Any], entry: Mapping[str, Any]
) -> None:
    """Move the files in a temporary folder into an artifact's, then enter them in its manifest.

    Args:
        part: name of the part; its files count once the manifest has an entry for it.
        temporary, path: the two folders.
        manifest: of the artifact, without the part.
        entry: what the manifest says of the part.
    """
    for file in sorted(temporary.iterdir()):
        place = path / file.name
        remove(place)  # of a process that was killed before the entry, or nobody's
        os.replace(file, place)
    fsync(path)
    write_manifest(path, {**manifest, "parts": {**manifest["parts"], part: entry}})


def write_manifest(path: Path, manifest: Mapping[str, Any]) -> None:
    """Replace the manifest of an artifact."""
    replace_text(path, MANIFEST, sealed_text(manifest))


def replace_text(path: Path, name: str, text: str) -> None:
    """Replace a text file of an artifact; readers see the old one or the new one."""
    temporary = _temporary(path, "-text")
    try:
        temporary.write_text(text, encoding="utf-8")
        fsync(temporary)
        os.replace(temporary, path / name)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    fsync((path / name).parent)


def rewrite_text(path: Path, manifest: Mapping[str, Any], part: str, *, name: str, text: str) -> None:
    """Replace a text file of a part together with its description.

    Meanwhile the manifest describes the file as it is and as it will be, and so the part is intact at every
    moment, whenever the process is killed.
    """
    entry = entry_of(manifest, part)
    described = describe(path / name)
    temporary = _temporary(path, "-text")
    temporary.write_text(text, encoding="utf-8")
    new = describe(temporary)
    temporary.unlink()

    def with_file(description: Mapping[str, Any]) -> dict[str, Any]:
        files = {**entry["files"], name: description}
        return {**manifest, "parts": {**manifest["parts"], part: {**entry, "files": files}}}

    write_manifest(path, with_file({**described, NEXT: new}))
    replace_text(path, name, text)
    write_manifest(path, with_file(new))


def put_aside(path: Path) -> Path:
    """Move a damaged artifact out of the way; return where it is now."""
    aside = _aside(path)
    os.rename(path, aside)
    fsync(path.parent)
    return aside


def put_part_aside(part: str, path: Path, manifest: Mapping[str, Any]) -> Path:
    """Move the files of a damaged part out of the way, and take it out of the manifest.

    Returns:
        the folder where they are now, with the manifest as it was.
    """
    aside = _aside(path)
    aside.mkdir()
    shutil.copy(path / MANIFEST, aside)
    others = {name: entry for name, entry in manifest["parts"].items() if name != part}
    write_manifest(path, {**manifest, "parts": others})
    for name in _top_names(part, manifest):
        if os.path.lexists(path / name):
            os.rename(path / name, aside / name)
    fsync(aside)
    fsync(path)
    return aside


def _top_names(part: str, manifest: Mapping[str, Any]) -> list[str]:
    """Names in the artifact's folder that belong to a part and to nothing else."""
    names = set(manifest["parts"][part]["files"])
    contents = contents_of(manifest["stage"], part)
    if contents is not None:
        names |= {*contents.required, *contents.optional}
    tops = {name.split("/")[0] for name in names}
    return sorted(tops - {MANIFEST, *manifest["files"]})


def _temporary(path: Path, kind: str = "") -> Path:
    return path.parent / f".{path.name}.tmp-{os.getpid()}{kind}"


def _aside(path: Path) -> Path:
    """A name beside an artifact's folder that is not taken."""
    now = f"{datetime.now():%Y-%m-%d_%H-%M-%S-%f}"
    return path.parent / f".{path.name}.damaged-{now}-{os.getpid()}"
