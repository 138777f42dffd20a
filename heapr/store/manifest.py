"""An artifact's manifest: what the artifact is, when and with what it was made, and every file's hash.

In: an origin and a folder of finished files, or the folder of an artifact. Out: JSON types. A manifest
carries a checksum of itself, and its key is the hash of what it says determines the artifact.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import stat
import subprocess
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from heapr.artifacts import MANIFEST
from heapr.files import fsync, hash_file, readable_by_umask
from heapr.origin import Origin, canonical
from heapr.sealed import DamagedError, read_sealed

if TYPE_CHECKING:
    import torch

    from heapr.measure import StageMeter

RECORDED_LIBRARIES = ("torch", "transformers", "safetensors", "tokenizers", "numpy")
# Fields of what `provenance` says, and of a manifest beyond them.
DESCRIBED: Mapping[str, type | tuple[type, ...]] = {
    "libraries": dict,
    "git_commit": (str, type(None)),
    "created": str,
    "seconds": (int, float),
    "peak_memory_bytes": int,
    "files": dict,
}
FIELDS = {"stage": str, "stage_version": int, "key": str, "upstream": dict, "config": dict, "parts": dict}
LARGEST = 2**63  # no number in a manifest comes near
SHA256 = re.compile(r"[0-9a-f]{64}")
# What a file will be next, while it is being rewritten.
NEXT = "next"


class MissingError(Exception):
    """There is no such artifact, or no such part of it."""


def new_manifest(origin: Origin, described: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest of an artifact that has no parts yet."""
    return {
        "stage": origin.stage,
        "stage_version": origin.version,
        "key": origin.key,
        "upstream": dict(origin.upstream),
        "config": canonical(origin.config),
        **described,
        "parts": {},
    }


def origin_of(manifest: Mapping[str, Any]) -> Origin:
    """What the manifest says determines the artifact."""
    return Origin(
        stage=manifest["stage"],
        version=manifest["stage_version"],
        config=manifest["config"],
        upstream=manifest["upstream"],
    )


def entry_of(manifest: Mapping[str, Any], part: str) -> Mapping[str, Any]:
    """The manifest's entry for a part, or for the artifact itself: files, seconds and peak memory.

    Raises:
        MissingError: it has no such part.
    """
    if not part:
        return manifest
    if part not in manifest["parts"]:
        raise MissingError
    entry: Mapping[str, Any] = manifest["parts"][part]
    return entry


def trusted_manifest(path: Path) -> dict[str, Any]:
    """Read an artifact's manifest and check everything that it says, except for its files.

    The folder's name is the hash of stage, version, configuration and upstream: a manifest that says anything
    else of them belongs to another artifact.

    Args:
        path: folder of the artifact, `<root>/<stage>/<key>`.

    Raises:
        MissingError: there is no artifact.
        DamagedError: the folder or the manifest is not as they were made, or belongs to something else.
        OSError: the manifest cannot be read.
    """
    _check_is_folder(path)
    manifest = _read(path / MANIFEST)
    _check_fields(manifest, {**FIELDS, **DESCRIBED}, MANIFEST)
    for part, entry in manifest["parts"].items():
        _check_fields(entry, DESCRIBED, f"part {part} in {MANIFEST}")
    said = origin_of(manifest)
    folder = (path.parent.name, path.name)
    if (said.stage, manifest["key"]) != folder or _key(said) != path.name:
        raise DamagedError(f"{MANIFEST} belongs to another artifact: {said.stage} {manifest['key']}")
    return manifest


def environment(device: torch.device) -> dict[str, Any]:
    """With what and where a run is made: versions, the code's commit, and what timings depend on."""
    from heapr.measure import machine

    return {"version": _own_version(), "machine": machine(device), **versions()}


def provenance(folder: Path, meter: StageMeter) -> dict[str, Any]:
    """Describe the files in a folder: when and with what they were made, their sizes and hashes.

    Also forces them to disk, and gives them the permissions of the umask, because safetensors writes files
    that only their owner can read.
    """
    files = {}
    for path in sorted(folder.rglob("*")):
        mode = 0o777 if path.is_dir() else 0o666
        path.chmod(readable_by_umask(mode))
        if path.is_file():
            files[path.relative_to(folder).as_posix()] = describe(path)
        fsync(path)
    return {
        **versions(),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(meter.seconds, 3),
        "peak_memory_bytes": meter.peak_memory_bytes,
        "files": files,
    }


def describe(file: Path) -> dict[str, Any]:
    return {"size": file.stat().st_size, "sha256": hash_file(file)}


def _check_is_folder(path: Path) -> None:
    """Check that an artifact's folder is one, and not a link to another one."""
    try:
        mode = path.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingError from error
    if stat.S_ISLNK(mode):
        raise DamagedError("its folder is a symbolic link")
    if not stat.S_ISDIR(mode):
        raise DamagedError("its folder is a file")


def _read(file: Path) -> dict[str, Any]:
    if file.is_symlink():
        raise DamagedError(f"{file.name} is a symbolic link")
    if not os.path.lexists(file):
        raise DamagedError(f"it has no {file.name}")
    if not file.is_file():
        raise DamagedError(f"{file.name} is not a file")
    try:
        return read_sealed(file)
    except DamagedError as error:
        raise DamagedError(f"{file.name}: {error}") from error


def _check_fields(entry: Any, fields: Mapping[str, Any], where: str) -> None:
    """Check that an entry has all its fields, and a file's name, size and hash in each of its files."""
    if not isinstance(entry, dict):
        raise DamagedError(f"{where}: it is not an object")
    for name, kind in fields.items():
        value = entry.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise DamagedError(f"{where}: {name} is missing or of the wrong type")
        if isinstance(value, int | float) and not 0 <= value < LARGEST:
            raise DamagedError(f"{where}: {name} is a number that cannot be")
    if not entry["files"]:
        raise DamagedError(f"{where}: it names no files")
    for name, described in entry["files"].items():
        if not _is_inside(name) or not _describes_a_file(described):
            raise DamagedError(f"{where}: the entry of file {name[:100]!r} cannot be")


def _is_inside(name: str) -> bool:
    """Whether a file's name stays inside its folder."""
    parts = PurePosixPath(name).parts
    is_plain = bool(parts) and "\0" not in name and name == "/".join(parts)
    return is_plain and not {"..", "/", "."} & set(parts)


def _describes_a_file(described: Any) -> bool:
    if not isinstance(described, dict):
        return False
    size, digest = described.get("size"), described.get("sha256")
    is_size = type(size) is int and size >= 0
    is_digest = isinstance(digest, str) and SHA256.fullmatch(digest) is not None
    is_next = NEXT not in described or _describes_a_file(described[NEXT])
    return is_size and is_digest and is_next


def _key(origin: Origin) -> str:
    """The key that follows from what a manifest says; empty if it says what cannot be."""
    try:
        return origin.key
    except (ValueError, TypeError, RecursionError):
        return ""


def versions() -> dict[str, Any]:
    """Versions of libraries, and the commit of the code that runs."""
    return {
        "libraries": {name: importlib.metadata.version(name) for name in RECORDED_LIBRARIES},
        "git_commit": _git_commit(),
    }


def _own_version() -> str:
    """Version of heapr; a checkout that runs without being installed has none."""
    try:
        return importlib.metadata.version("heapr")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _git_commit() -> str | None:
    """Commit of the code that runs, if git tracks it.

    Otherwise, a repository around it is somebody else's, such as one with a virtual environment in it.
    """
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        listed = _output_of([*git, "ls-files", Path(__file__).name])
        head = _output_of([*git, "rev-parse", "--verify", "HEAD"])
    except OSError:
        return None
    return head if head and listed else None


def _output_of(command: list[str]) -> str:
    """What a command prints, without blanks around it."""
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
