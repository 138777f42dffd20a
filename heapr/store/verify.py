"""Whether an artifact on disk is what its manifest and its place in the store say.

In: an artifact's folder. Out: nothing, or what is missing or wrong. Nothing is changed.
Checked are the folder (no link), the manifest (its checksum, and that it belongs to this stage, version,
configuration and key), every file's size and hash, what is in the files by their headers, and that there are
no others.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from heapr.artifacts import MANIFEST
from heapr.files import hash_file
from heapr.remembered_hashes import hash_file_once, is_settled, state_of
from heapr.sealed import DamagedError
from heapr.store.contents import CONTENTS, contents_of
from heapr.store.manifest import NEXT, entry_of, trusted_manifest

# Files that NFS makes of those that are removed while they are open, and that macOS makes for its own use.
NOBODYS = (".nfs", ".DS_Store", "._")
LARGE_FILE = 64 * 2**20  # bytes; hashes of smaller files are remembered in this process only


class DamagedPartError(DamagedError):
    """A part is damaged, and the artifact that it belongs to is not."""


@dataclass
class Hashes:
    """Hashes of files, each computed once per process as long as the file does not change.

    Args:
        memory: folder that remembers the hashes of large files from one process to the next; None reads
            every file.
    """

    memory: Path | None
    _known: dict[tuple[str, ...], str] = field(default_factory=dict)

    def of(self, file: Path) -> str:
        """The sha256 of a file."""
        state = state_of(file)
        name = (str(file), *map(str, state))
        if name in self._known:
            return self._known[name]
        is_large = file.stat().st_size > LARGE_FILE
        if is_large and self.memory is not None:
            digest = hash_file_once(file, self.memory)
        else:
            digest = hash_file(file)
        if is_settled(state):
            self._known[name] = digest
        return digest


def verify(path: Path, part: str, hashes: Hashes) -> dict[str, Any]:
    """Check an artifact, or a part of it.

    Args:
        path: folder of the artifact.
        part: its name; empty for the artifact itself.
        hashes: computes hashes of files.

    Returns:
        the manifest.

    Raises:
        MissingError: it is not there.
        DamagedPartError: the part is not as it was made.
        DamagedError: the artifact is not.
        OSError: it cannot be read.
    """
    manifest = trusted_manifest(path)
    files = entry_of(manifest, part)["files"]
    try:
        for name, described in files.items():
            _check_file(path, name, described, hashes)
        contents = contents_of(path.parent.name, part)
        if contents is not None:
            contents.check(path, files)
        found = set(_files_below(path))
        _check_nothing_else(found, manifest, part)
    except DamagedError as error:
        if part:
            raise DamagedPartError(str(error)) from error
        raise
    return manifest


def _check_file(path: Path, name: str, described: Mapping[str, Any], hashes: Hashes) -> None:
    """Check that a file has the size and hash that the manifest says, or will say in a moment."""
    file = path / name
    try:
        status = file.lstat()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DamagedError(f"{name} is missing") from error
    if not stat.S_ISREG(status.st_mode):
        raise DamagedError(f"{name} is not a plain file")
    allowed = [described, described[NEXT]] if NEXT in described else [described]
    if status.st_size not in [each["size"] for each in allowed]:
        raise DamagedError(f"{name} has {status.st_size} bytes, not {described['size']}")
    digest = hashes.of(file)
    if digest not in [each["sha256"] for each in allowed]:
        raise DamagedError(f"{name} has changed")


def _check_nothing_else(found: set[str], manifest: Mapping[str, Any], part: str) -> None:
    """Check that there are no files but those of the manifest, and of parts that are being added.

    The artifact itself answers for what lies outside all parts, and a part for what lies in its folder.
    """
    stage = manifest["stage"]
    listed = {MANIFEST, *manifest["files"]}
    for entry in manifest["parts"].values():
        listed |= entry["files"].keys()
    others = sorted(found - listed)
    for name in others:
        places = [of for of in CONTENTS.get(stage, {}) if _has_place(stage, of, name)]
        if stage in CONTENTS and (part in places or not (part or places)):
            raise DamagedError(f"{name} is not in the manifest")


def _has_place(stage: str, part: str, name: str) -> bool:
    contents = contents_of(stage, part)
    return contents is not None and contents.has_place_for(name)


def _files_below(path: Path) -> Iterator[str]:
    """Everything below a folder but folders that hold something: files, links, empty folders.

    What file systems and desktops put everywhere is left out.
    """
    for place, folders, files in os.walk(path):
        below = Path(place)
        links = [name for name in folders if (below / name).is_symlink()]
        for name in [*files, *links]:
            if not name.startswith(NOBODYS):
                yield (below / name).relative_to(path).as_posix()
        if not folders and not files:
            yield below.relative_to(path).as_posix()
