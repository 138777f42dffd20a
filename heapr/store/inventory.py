"""What is in a store: its artifacts, what each was made from, and what needs it.

In: the store's folder. Out: a list of `Entry`. Manifests are read and checked, files are not.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heapr.sealed import DamagedError
from heapr.store.manifest import MissingError, trusted_manifest

STAGES = ("calibrate", "score", "prune", "evaluate")


@dataclass(frozen=True)
class Entry:
    """One artifact.

    Attributes:
        path: its folder.
        manifest: None if it is damaged.
        problem: what is wrong with it; empty if nothing is.
    """

    path: Path
    manifest: Mapping[str, Any] | None
    problem: str = ""

    @property
    def name(self) -> str:
        """Stage and key, by which runs refer to it."""
        return f"{self.path.parent.name}/{self.path.name}"

    @property
    def parts(self) -> list[str]:
        """Names of its parts."""
        return [] if self.manifest is None else list(self.manifest["parts"])

    @property
    def num_bytes(self) -> int:
        """Size of all files in its folder."""
        return size_of(self.path)

    @property
    def upstream(self) -> list[str]:
        """Names of the artifacts that it was made from."""
        if self.manifest is None:
            return []
        return [f"{stage}/{key}" for stage, key in self.manifest["upstream"].items()]


def entries(root: Path) -> list[Entry]:
    """All artifacts of a store, in the order of stages and of the time when they were made."""
    looked_at = [_entry(path) for path in _artifact_folders(root)]
    found = [entry for entry in looked_at if entry is not None]
    return sorted(found, key=_place)


def intact_manifests(root: Path) -> list[Mapping[str, Any]]:
    """The manifests of a store that can be believed."""
    return [entry.manifest for entry in entries(root) if entry.manifest is not None]


def made_from(found: Sequence[Entry]) -> dict[str, list[str]]:
    """By the name of each artifact, the names of those that were made from it."""
    users: dict[str, list[str]] = {}
    for entry in found:
        for name in entry.upstream:
            users.setdefault(name, []).append(entry.name)
    return users


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files below a folder, as far as nobody removes them meanwhile."""
    files = [path] if path.is_symlink() or not path.is_dir() else []
    for place, _, names in os.walk(path):
        files += [Path(place, name) for name in names]
    num_bytes = 0
    for file in files:
        with suppress(FileNotFoundError):
            num_bytes += file.lstat().st_size
    return num_bytes


def _entry(path: Path) -> Entry | None:
    """The artifact in a folder; None if it has been removed since."""
    try:
        return Entry(path, trusted_manifest(path))
    except MissingError:
        return None
    except (DamagedError, OSError) as error:
        return Entry(path, None, str(error))


def _artifact_folders(root: Path) -> Iterator[Path]:
    for stage in sorted(root.glob("[!.]*")):
        if stage.is_dir():
            yield from stage.glob("[!.]*")


def _place(entry: Entry) -> tuple[int, str, str]:
    stage = entry.path.parent.name
    number = STAGES.index(stage) if stage in STAGES else len(STAGES)
    created = "" if entry.manifest is None else str(entry.manifest["created"])
    return number, created, entry.name
