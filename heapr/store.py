"""The artifact store: every stage's result on disk, by the hash of everything that determines it.

In: stage, version, resolved configuration, keys of upstream artifacts, and a function that makes the result in an empty
folder. Out: an `Artifact`. A result is made once, whatever happens: under a lock, in a temporary folder, verified when
read, published by one rename. A process that is killed leaves only a temporary folder, which the next one sweeps.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from heapr.errors import ConfigError
from heapr.files import fsync, hash_file, hash_file_once, write_json, write_text
from heapr.measure import StageMeter

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
LARGE_FILE = 64 * 2**20  # bytes; hashing less takes no time to speak of
KEY_LENGTH = 16  # hexadecimal digits: 64 bits
RECORDED_LIBRARIES = ("torch", "transformers", "safetensors", "tokenizers", "numpy")


@dataclass(frozen=True)
class Artifact:
    """A finished result.

    Attributes:
        stage, key: what it is.
        path: its folder; read-only by convention.
        cached: whether it was found rather than made.
        seconds: time spent on finding or making it.
        peak_memory_bytes: peak memory of the process (or of the GPU, if one is used) while it was made; 0 if cached.
    """

    stage: str
    key: str
    path: Path
    cached: bool
    seconds: float
    peak_memory_bytes: int

    def summary(self) -> dict[str, Any]:
        return {
            "stage": self.stage,
            "key": self.key,
            "path": str(self.path),
            "cached": self.cached,
            "seconds": round(self.seconds, 3),
            "peak_memory_bytes": self.peak_memory_bytes,
        }


@dataclass(frozen=True)
class Recipe:
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
        content = {"stage": self.stage, "version": self.version, "config": self.config, "upstream": self.upstream}
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
            raise ConfigError(f"cannot write '{root}': {error.strerror}; choose another folder with paths.outputs=...") from error

    @property
    def digests(self) -> Path:
        """Where hashes of large files are remembered."""
        return self.root / ".digests"

    def path(self, recipe: Recipe) -> Path:
        return self.root / recipe.stage / recipe.key

    def has(self, recipe: Recipe, needs: Sequence[str] = ()) -> bool:
        """Whether a complete, undamaged artifact is there, with all the files that are needed."""
        return self._is_intact(self.path(recipe), needs)

    def get(self, recipe: Recipe, make: Callable[[Path], None], needs: Sequence[str] = ()) -> Artifact:
        """The artifact of a recipe; `make` fills an empty folder with its files if it is not there yet.

        Args:
            recipe: what is wanted.
            make: how it is made; the same recipe always gives the same files, of which some may be left out.
            needs: files that must not have been left out.
        """
        path = self.path(recipe)
        with StageMeter(self.device) as meter:
            cached = self._is_intact(path, needs) or not self._make_once(recipe, make, needs)
        peak = 0 if cached else meter.peak_memory_bytes
        return Artifact(recipe.stage, recipe.key, path, cached, meter.seconds, peak)

    def rewrite(self, recipe: Recipe, name: str, change: Callable[[str], str]) -> None:
        """Change one text file of an artifact, for what is known only later. Killed in between, it is made again."""
        path = self.path(recipe)
        with _locked(path):
            file = path / name
            before = file.read_text(encoding="utf-8")
            text = change(before)
            if text == before:
                return
            manifest = json.loads((path / MANIFEST).read_text())
            write_text(file, text)
            manifest["files"][name] = _describe(file)
            write_json(path / MANIFEST, manifest)

    def _make_once(self, recipe: Recipe, make: Callable[[Path], None], needs: Sequence[str]) -> bool:
        """Make the artifact under its lock. False if another process made it while this one waited."""
        path = self.path(recipe)
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path):
            if self._is_intact(path, needs):
                return False
            _publish(recipe, path, make, StageMeter(self.device))
            return True

    def _is_intact(self, path: Path, needs: Sequence[str] = ()) -> bool:
        """Whether the folder has a manifest, the needed files, and every file has the size and hash that it had when it was
        made. The hash of a large file is remembered until the file changes."""
        if not (path / MANIFEST).is_file():
            return False
        try:
            files = json.loads((path / MANIFEST).read_text())["files"]
        except (json.JSONDecodeError, KeyError):
            files = {"": {"size": -1, "sha256": ""}}
        for name, expected in files.items():
            if not self._is_as_made(path / name, expected):
                logger.warning("%s %s is damaged (%s); it will be made again", path.parent.name, path.name, name or MANIFEST)
                return False
        return set(needs) <= set(files)

    def _is_as_made(self, file: Path, expected: Mapping[str, Any]) -> bool:
        if not file.is_file() or file.stat().st_size != expected["size"]:
            return False
        digest = hash_file_once(file, self.digests) if file.stat().st_size > LARGE_FILE else hash_file(file)
        return bool(digest == expected["sha256"])


def canonical_json(value: Any) -> str:
    """One text for equal values: sorted keys, and floats without the noise of their last digits (0.6000000000000001)."""
    return json.dumps(_canonical(value), sort_keys=True, separators=(",", ":"), allow_nan=False)


def _canonical(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.12g}")
    if isinstance(value, Mapping):
        return {str(key): _canonical(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical(item) for item in value]
    return value


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of one artifact; the operating system frees it when its holder dies."""
    lock = FileLock(path.parent / f".{path.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.info("%s %s: another process is making it, waiting", path.parent.name, path.name)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _publish(recipe: Recipe, path: Path, make: Callable[[Path], None], meter: StageMeter) -> None:
    """Make the files in a temporary folder, describe them, and rename it into place. Called under the lock."""
    for leftover in path.parent.glob(f".{path.name}.tmp-*"):
        shutil.rmtree(leftover)
    temporary = path.parent / f".{path.name}.tmp-{os.getpid()}"
    temporary.mkdir()
    try:
        with meter:
            make(temporary)
        _write_manifest(recipe, temporary, meter)
        aside = path.parent / f".{path.name}.tmp-{os.getpid()}-old"
        if path.exists():  # damaged, or without a file that is needed now; who reads it meanwhile misses it for a moment at most
            os.rename(path, aside)
        os.rename(temporary, path)
        fsync(path.parent)
        shutil.rmtree(aside, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_manifest(recipe: Recipe, folder: Path, meter: StageMeter) -> None:
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        files[path.relative_to(folder).as_posix()] = _describe(path)
        fsync(path)
    manifest = {
        "stage": recipe.stage,
        "stage_version": recipe.version,
        "key": recipe.key,
        "upstream": dict(recipe.upstream),
        "config": _canonical(recipe.config),
        "libraries": {name: importlib.metadata.version(name) for name in RECORDED_LIBRARIES},
        "git_commit": _git_commit(),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(meter.seconds, 3),
        "peak_memory_bytes": meter.peak_memory_bytes,
        "files": files,
    }
    write_json(folder / MANIFEST, manifest)
    fsync(folder)


def _describe(file: Path) -> dict[str, Any]:
    return {"size": file.stat().st_size, "sha256": hash_file(file)}


def _git_commit() -> str | None:
    """Commit of the code that runs, if it runs from a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return result.stdout.strip() or None
