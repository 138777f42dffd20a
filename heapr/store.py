"""The artifact store: every stage's result on disk, by the hash of everything that determines it.

In: stage, version, resolved configuration, keys of upstream artifacts, a function that computes the result,
and one that writes it into an empty folder. Out: an `Artifact`. A result is made once, whatever happens:
under a lock, in a temporary folder, verified when read, published by one rename. A process that is killed
leaves a temporary folder, which the next one sweeps, and its scratch, with which the next one goes on.
What is made from an artifact alone and may be left out, or fail, is a *part* of it: other files in the same
folder, made, verified and described by themselves, so that nothing that was finished is lost with them.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError

from heapr.artifacts import MANIFEST
from heapr.errors import ConfigError
from heapr.files import fsync, hash_file, hash_file_once, readable_by_umask, write_json, write_text
from heapr.manifest import describe, entry_of, provenance
from heapr.measure import StageMeter

logger = logging.getLogger(__name__)

SCRATCH_DAYS = 14  # after which unfinished work is taken for given up
LARGE_FILE = 64 * 2**20  # bytes; hashing less takes no time to speak of
WHOLE = ""  # the artifact itself, not a part of it
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
KEY_LENGTH = 16  # hexadecimal digits: 64 bits

T = TypeVar("T")


@dataclass(frozen=True)
class Artifact:
    """A finished result.

    Attributes:
        stage, key, part: what it is.
        path: its folder; read-only by convention. A part is in the folder of the whole.
        cached: whether it was found rather than made.
        seconds: time spent on finding or making it.
        peak_memory_bytes: peak memory of the process (or of the GPU, if one is used) while it was made; 0 if
            cached.
    """

    stage: str
    key: str
    part: str
    path: Path
    cached: bool
    seconds: float
    peak_memory_bytes: int

    def summary(self) -> dict[str, Any]:
        return {
            "stage": self.stage,
            "key": self.key,
            "part": self.part,
            "path": str(self.path),
            "cached": self.cached,
            "seconds": round(self.seconds, 3),
            "peak_memory_bytes": self.peak_memory_bytes,
        }


@dataclass(frozen=True)
class Origin:
    """Everything that determines a result.

    Attributes:
        stage, version: which code makes it; the version is raised when the code's results change.
        config: resolved configuration of the stage, JSON types only.
        upstream: keys of the artifacts it is made from, by stage.
    """

    stage: str
    version: int
    config: Mapping[str, Any]
    upstream: Mapping[str, str]

    @property
    def key(self) -> str:
        content = {
            "stage": self.stage,
            "version": self.version,
            "config": self.config,
            "upstream": self.upstream,
        }
        return hashlib.sha256(canonical_json(content).encode()).hexdigest()[:KEY_LENGTH]


class Store:
    """Artifacts below one folder, `<root>/<stage>/<key>/`.

    Args:
        root: made if it is not there.
        device: whose peak memory is measured while an artifact is made.

    Raises:
        ConfigError: the folder cannot be written.
    """

    def __init__(self, root: Path, device: torch.device) -> None:
        self.root, self.device = root, device
        try:
            root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=root):
                pass
        except OSError as error:
            raise ConfigError(
                f"cannot write '{root}': {error.strerror}; choose another folder with paths.outputs=..."
            ) from error

    @property
    def digests(self) -> Path:
        """Where hashes of large files are remembered."""
        return self.root / ".digests"

    def path(self, origin: Origin) -> Path:
        return self.root / origin.stage / origin.key

    def has(self, origin: Origin, part: str = WHOLE) -> bool:
        """Whether an artifact, or a part of it, is there, complete and undamaged."""
        with _one_line_about_permissions(self.root):
            return self._is_intact(self.path(origin), part)

    def get(
        self, origin: Origin, compute: Callable[[], T], write: Callable[[Path, T], None], part: str = WHOLE
    ) -> Artifact:
        """The artifact of an origin, or a part of one that is there. What is missing is computed, then
        written.

        Args:
            origin: what is wanted.
            compute: gives the value; touches no file of the artifact.
            write: fills an empty folder with the files of the value; the same origin always gives the same
                files.
            part: a name; the files are added to the artifact under it.

        Raises:
            ConfigError: no permission to read or write here, or no space left; nothing that was finished
                before is lost.
        """
        path = self.path(origin)
        with _one_line_about_permissions(self.root), StageMeter(self.device) as meter:
            cached = self._is_intact(path, part) or not self._make_once(origin, compute, write, part)
        peak = 0 if cached else meter.peak_memory_bytes
        return Artifact(origin.stage, origin.key, part, path, cached, meter.seconds, peak)

    def scratch(self, origin: Origin, part: str = WHOLE) -> Path:
        """A folder for what the computation of an artifact or part has done so far. It outlives the process:
        who computes the same next finds what a killed one left. It is removed when the artifact is there, and
        `SCRATCH_DAYS` after its last change.

        To be asked for inside `compute`, which runs under the artifact's lock: nobody else uses it meanwhile.
        What is left in it may be half a file; write with `heapr.files.write_text` or rename what is whole.
        """
        folder = _scratch_of(self.path(origin), part)
        folder.mkdir(parents=True, exist_ok=True)
        os.utime(folder)
        return folder

    def rewrite(self, origin: Origin, part: str, name: str, change: Callable[[str], str]) -> None:
        """Change one text file of a part, for what is known only later. Killed in between, that part is made
        again."""
        path = self.path(origin)
        with _one_line_about_permissions(self.root), _locked(path):
            file = path / name
            before = file.read_text(encoding="utf-8")
            text = change(before)
            if text == before:
                return
            manifest = json.loads((path / MANIFEST).read_text())
            write_text(file, text)
            manifest["parts"][part]["files"][name] = describe(file)
            write_json(path / MANIFEST, manifest)

    def check_space(self, num_bytes: int, what: str, instead: str) -> None:
        """Refuse what will not fit.

        Args:
            num_bytes: that will be written, at least.
            what: is written.
            instead: what to do without the space.

        Raises:
            ConfigError: less is free.
        """
        free = shutil.disk_usage(self.root).free
        if num_bytes > free:
            raise ConfigError(
                f"{what} need {num_bytes / 1e9:.3g} GB, and '{self.root}' has {free / 1e9:.3g} GB free; free"
                f" some, choose another folder with paths.outputs=..., or {instead}"
            )

    def _make_once(
        self, origin: Origin, compute: Callable[[], T], write: Callable[[Path, T], None], part: str
    ) -> bool:
        """Make the artifact or a part of it under its lock. False if another process made it while this one
        waited."""
        path = self.path(origin)
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path):
            if self._is_intact(path, part):
                return False
            _sweep_old_scratch(self.root)
            with _empty_folder(path) as temporary:
                meter = StageMeter(self.device)
                with _one_line_about_space(self.root), meter:
                    write(temporary, compute())
                if part:
                    _add_part(part, temporary, path, meter)
                else:
                    _publish(origin, temporary, path, meter)
            shutil.rmtree(_scratch_of(path, part), ignore_errors=True)
            return True

    def _is_intact(self, path: Path, part: str) -> bool:
        """Whether the folder has a manifest that knows the part, and every file has the size and hash that it
        had when it was made. The hash of a large file is remembered until the file changes."""
        if not (path / MANIFEST).is_file():
            return False
        try:
            manifest = json.loads((path / MANIFEST).read_text())
            if part and part not in manifest["parts"]:
                return False
            files = entry_of(manifest, part)["files"]
        except (json.JSONDecodeError, KeyError):
            files = {"": {"size": -1, "sha256": ""}}
        for name, expected in files.items():
            if not self._is_as_made(path / name, expected):
                logger.warning(
                    "%s %s is damaged (%s); it will be made again",
                    path.parent.name,
                    path.name,
                    name or MANIFEST,
                )
                return False
        return True

    def _is_as_made(self, file: Path, expected: Mapping[str, Any]) -> bool:
        if not file.is_file() or file.stat().st_size != expected["size"]:
            return False
        digest = hash_file_once(file, self.digests) if file.stat().st_size > LARGE_FILE else hash_file(file)
        return bool(digest == expected["sha256"])


def canonical_json(value: Any) -> str:
    """One text for equal values: sorted keys, and floats without the noise of their last digits
    (0.6000000000000001)."""
    return json.dumps(_canonical(value), sort_keys=True, separators=(",", ":"), allow_nan=False)


def _canonical(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.12g}")
    if isinstance(value, Mapping):
        return {str(key): _canonical(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical(item) for item in value]
    return value


def _lock_of(path: Path) -> FileLock:
    """Of one artifact; the operating system frees it when its holder dies. A lock holds nothing, so whoever
    shares the folder's group may take it, whatever the umask of the one who made it."""
    return FileLock(path.parent / f".{path.name}.lock", mode=readable_by_umask(0o666) | 0o660)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of one artifact, and say so if that takes waiting."""
    lock = _lock_of(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.info("%s %s: another process is making it, waiting", path.parent.name, path.name)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _one_line_about_permissions(root: Path) -> Iterator[None]:
    """A store that another user made, whose umask kept it to himself."""
    try:
        yield
    except PermissionError as error:
        raise ConfigError(
            f"no permission for '{error.filename or root}', which another user made; choose another folder"
            " with paths.outputs=..., or share this one: the same group, umask 002, chmod -R g+rwX"
        ) from error


@contextmanager
def _one_line_about_space(root: Path) -> Iterator[None]:
    """A disk that is full; safetensors says so in words alone."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = getattr(error, "errno", None)
        if number in NO_SPACE or any(f"os error {code}" in str(error) for code in NO_SPACE):
            raise ConfigError(
                f"no space left in '{root}'; what was finished is kept: free some space and start again, or"
                " choose another folder with paths.outputs=..."
            ) from error
        raise


@contextmanager
def _empty_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside an artifact's, and no other left. Called under the lock."""
    for leftover in path.parent.glob(f".{path.name}.tmp-*"):
        shutil.rmtree(leftover)
    temporary = path.parent / f".{path.name}.tmp-{os.getpid()}"
    temporary.mkdir()
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _scratch_of(path: Path, part: str) -> Path:
    return path.parent / f".{path.name}.scratch-{part or 'whole'}"


def _sweep_old_scratch(root: Path) -> None:
    """Remove scratch that nothing has changed for `SCRATCH_DAYS` and nobody uses: of a computation that was
    given up."""
    limit = time.time() - SCRATCH_DAYS * 24 * 3600
    for folder in root.glob("*/.*.scratch-*"):
        lock = _lock_of(folder.parent / folder.name.split(".")[1])
        with suppress(OSError, Timeout), lock.acquire(timeout=0):  # another user's, in use, or gone by now
            if _last_change(folder) < limit:
                shutil.rmtree(folder)


def _last_change(folder: Path) -> float:
    return max(entry.stat().st_mtime for entry in [folder, *folder.rglob("*")])


def _publish(origin: Origin, temporary: Path, path: Path, meter: StageMeter) -> None:
    """Describe the files in a temporary folder and rename it into place. Called under the lock."""
    manifest = {
        "stage": origin.stage,
        "stage_version": origin.version,
        "key": origin.key,
        "upstream": dict(origin.upstream),
        "config": _canonical(origin.config),
        **provenance(temporary, meter),
        "parts": {},
    }
    write_json(temporary / MANIFEST, manifest)
    fsync(temporary)
    aside = path.parent / f".{path.name}.tmp-{os.getpid()}-old"
    if path.exists():  # damaged; who reads it meanwhile misses it for a moment at most
        os.rename(path, aside)
    os.rename(temporary, path)
    fsync(path.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _add_part(part: str, temporary: Path, path: Path, meter: StageMeter) -> None:
    """Move the files in a temporary folder into an artifact's; they count once the manifest knows them.
    Called under the lock."""
    described = provenance(temporary, meter)
    manifest = json.loads((path / MANIFEST).read_text())
    if manifest["parts"].pop(part, None):  # damaged
        write_json(path / MANIFEST, manifest)
    for entry in sorted(temporary.iterdir()):
        place = path / entry.name
        if place.is_dir():
            shutil.rmtree(place)
        os.replace(entry, place)
    fsync(path)
    manifest["parts"][part] = described
    write_json(path / MANIFEST, manifest)
    fsync(path)
