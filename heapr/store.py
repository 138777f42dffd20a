"""The artifact store: every stage's result on disk, under the hash of everything that determines it.

In: an `Origin` (stage, version, resolved configuration, keys of upstream artifacts), a function that computes
the result, and one that writes it into an empty folder. Out: an `Artifact`. Each result is made once: under a
lock, in a temporary folder, published by one rename, and verified when it is read. A killed process leaves a
temporary folder, which the next one removes, and its scratch, from which the next one continues. Several
processes of one run compute a result together; rank 0 holds the lock, decides and writes.

What is made from one artifact alone and may be left out, or fail, is a *part* of it: more files in the same
folder, which are made, verified and described separately, so that their failure loses nothing that was
finished.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from filelock import Timeout
from safetensors import SafetensorError

from heapr.artifacts import MANIFEST
from heapr.errors import ConfigError
from heapr.files import hash_file, hash_file_once, write_json, write_text
from heapr.locks import lock_of, locked
from heapr.manifest import describe, entry_of, provenance
from heapr.measure import StageMeter
from heapr.origin import Origin, canonical
from heapr.publishing import add_part, empty_folder, publish
from heapr.ranks import ONE_PROCESS, Ranks
from heapr.shared_folder import wait_to_see

logger = logging.getLogger(__name__)

SCRATCH_DAYS = 14  # scratch that is unchanged for longer counts as abandoned
LARGE_FILE = 64 * 2**20  # bytes; smaller files are hashed each time, which takes little time
WHOLE = ""  # in place of a part's name: the artifact itself
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)

T = TypeVar("T")


@dataclass(frozen=True)
class Artifact:
    """A finished result.

    Attributes:
        stage, key, part: which result it is.
        path: its folder; read-only by convention. A part lies in the folder of its artifact.
        cached: whether it was found rather than made.
        seconds: time that finding or making it took.
        peak_memory_bytes: peak memory of the process (of the GPU, if one is used) while it was made; 0 if
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
        """Its entry in `summary.json`."""
        return {
            "stage": self.stage,
            "key": self.key,
            "part": self.part,
            "path": str(self.path),
            "cached": self.cached,
            "seconds": round(self.seconds, 3),
            "peak_memory_bytes": self.peak_memory_bytes,
        }


class Store:
    """Artifacts below one folder, `<root>/<stage>/<key>/`.

    Args:
        root: the folder; created if it does not exist.
        device: its peak memory is measured while an artifact is made.
        ranks: the processes that make artifacts together. All of them call `has` and `get`, in one order.
        wait_minutes: for an artifact that another run is making; None waits as long as it takes.
        record: what else the manifests say; it determines no result.

    Raises:
        ConfigError: the folder is not writable.
    """

    def __init__(
        self,
        root: Path,
        device: torch.device,
        *,
        ranks: Ranks = ONE_PROCESS,
        wait_minutes: float | None = None,
        record: Mapping[str, Any] | None = None,
    ) -> None:
        self.root, self.device, self._wait_minutes = root, device, wait_minutes
        self._ranks, self._record = ranks, dict(record or {})
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
        """Folder that remembers the hashes of large files."""
        return self.root / ".digests"

    def path(self, origin: Origin) -> Path:
        """Folder of an artifact, whether or not it has been made."""
        return self.root / origin.stage / origin.key

    def has(self, origin: Origin, part: str = WHOLE) -> bool:
        """Whether an artifact, or a part of it, is in the store, complete and undamaged."""
        with _one_line_about_permissions(self.root):
            return self._first_finds_intact(self.path(origin), part)

    def get(
        self, origin: Origin, compute: Callable[[], T], write: Callable[[Path, T], None], part: str = WHOLE
    ) -> Artifact:
        """Return an artifact, or a part of one that is in the store; compute and write it if it is missing.

        Args:
            origin: which artifact.
            compute: returns the value; touches no file of the artifact.
            write: fills an empty folder with the value's files; the same origin always gives the same files.
            part: name under which the files are added to the artifact.

        Raises:
            ConfigError: no permission to read or write here, or no space left. Nothing that was finished
                before is lost.
        """
        path = self.path(origin)
        with _one_line_about_permissions(self.root), StageMeter(self.device) as meter:
            cached = self._first_finds_intact(path, part) or not self._make_once(origin, compute, write, part)
        peak = 0 if cached else meter.peak_memory_bytes
        return Artifact(origin.stage, origin.key, part, path, cached, meter.seconds, peak)

    def scratch(self, origin: Origin, part: str = WHOLE) -> Path:
        """A folder for the intermediate results of a computation, which outlives the process; one for each
        rank.

        The next process that computes the same artifact or part finds what a killed one left. The folder is
        removed when the artifact is finished, or `SCRATCH_DAYS` after its last change.

        Call it only inside `compute`, which runs under the artifact's lock, so that nobody else uses the
        folder. A killed process may leave half a file: write with `heapr.files.write_text`, or rename a file
        once it is whole.
        """
        folder = _scratch_of(self.path(origin), part)
        folder.mkdir(parents=True, exist_ok=True)
        os.utime(folder)
        if self._ranks.size == 1:
            return folder
        of_rank = folder / f"rank-{self._ranks.rank}-of-{self._ranks.size}"
        of_rank.mkdir(exist_ok=True)
        return of_rank

    def rewrite(self, origin: Origin, part: str, name: str, change: Callable[[str], str]) -> None:
        """Change one text file of a part, to add what is known only later.

        A process that is killed in between leaves a damaged part, which is then made again.
        """
        path = self.path(origin)
        with _one_line_about_permissions(self.root), self._locked(path):
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
        """Check that there is room on the disk.

        Args:
            num_bytes: how much will be written, at least.
            what: what will be written, for the message.
            instead: what to do if there is no space, for the message.

        Raises:
            ConfigError: less than that is free.
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
        """Make the artifact, or a part of it, under its lock.

        Returns:
            False if another process made it while this one waited for the lock.
        """
        path = self.path(origin)
        with ExitStack() as stack:
            if self._ranks.is_first:
                path.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(self._locked(path))
            if self._first_finds_intact(path, part):
                return False
            if self._ranks.is_first:
                _remove_old_scratch(self.root)
                self._make(origin, compute, write, part)
            else:
                compute()
            self._ranks.barrier()
            if self._ranks.is_first:
                shutil.rmtree(_scratch_of(path, part), ignore_errors=True)
        wait_to_see(path, partial(_is_listed, path, part), self._ranks)
        return True

    def _make(
        self, origin: Origin, compute: Callable[[], T], write: Callable[[Path, T], None], part: str
    ) -> None:
        """Compute, write and publish the artifact, or a part of it."""
        path = self.path(origin)
        with empty_folder(path) as temporary:
            meter = StageMeter(self.device)
            with _one_line_about_space(self.root), meter:
                write(temporary, compute())
            described = {**provenance(temporary, meter), **self._record}
            if part:
                add_part(part, temporary, path, described)
            else:
                publish(temporary, path, _manifest(origin, described))

    def _first_finds_intact(self, path: Path, part: str) -> bool:
        """Whether rank 0 finds an artifact complete and undamaged; all ranks go by that."""
        return self._ranks.of_first(self._ranks.is_first and self._is_intact(path, part))

    def _locked(self, path: Path) -> AbstractContextManager[None]:
        """Hold the lock of the artifact in a folder."""
        what = f"{path.parent.name} {path.name}"
        return locked(_lock_path(path), what, wait_minutes=self._wait_minutes)

    def _is_intact(self, path: Path, part: str) -> bool:
        """Whether the manifest has an entry for the part, and every file the size and hash recorded there.

        The hash of a large file is remembered until the file changes.
        """
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
                stage, key, where = path.parent.name, path.name, name or MANIFEST
                logger.warning("%s %s is damaged (%s); it will be made again", stage, key, where)
                return False
        return True

    def _is_as_made(self, file: Path, expected: Mapping[str, Any]) -> bool:
        """Whether a file has the size and hash that its manifest recorded."""
        if not file.is_file() or file.stat().st_size != expected["size"]:
            return False
        is_large = file.stat().st_size > LARGE_FILE
        digest = hash_file_once(file, self.digests) if is_large else hash_file(file)
        return bool(digest == expected["sha256"])


@contextmanager
def _one_line_about_permissions(root: Path) -> Iterator[None]:
    """Turn missing permissions into one clear line: another user's umask kept the store private."""
    try:
        yield
    except PermissionError as error:
        raise ConfigError(
            f"no permission for '{error.filename or root}', which another user made; choose another folder"
            " with paths.outputs=..., or share this one: the same group, umask 002, chmod -R g+rwX"
        ) from error


@contextmanager
def _one_line_about_space(root: Path) -> Iterator[None]:
    """Turn a full disk into one clear line; safetensors reports it only in its message."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        is_named = any(f"os error {code}" in str(error) for code in NO_SPACE)
        if is_named or getattr(error, "errno", None) in NO_SPACE:
            raise ConfigError(
                f"no space left in '{root}'; what was finished is kept: free some space and start again, or"
                " choose another folder with paths.outputs=..."
            ) from error
        raise


def _is_listed(path: Path, part: str) -> bool:
    """Whether an artifact has a manifest, with an entry for the part."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
    except (OSError, ValueError):
        return False
    return not part or part in manifest["parts"]


def _manifest(origin: Origin, described: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "stage": origin.stage,
        "stage_version": origin.version,
        "key": origin.key,
        "upstream": dict(origin.upstream),
        "config": canonical(origin.config),
        **described,
        "parts": {},
    }


def _lock_path(path: Path) -> Path:
    return path.parent / f".{path.name}.lock"


def _scratch_of(path: Path, part: str) -> Path:
    return path.parent / f".{path.name}.scratch-{part or 'whole'}"


def _remove_old_scratch(root: Path) -> None:
    """Remove scratch that nobody uses and nothing has changed for `SCRATCH_DAYS`."""
    limit = time.time() - SCRATCH_DAYS * 24 * 3600
    for folder in root.glob("*/.*.scratch-*"):
        lock = lock_of(_lock_path(folder.parent / folder.name.split(".")[1]))
        # Skip what is in use, belongs to another user or is gone by now.
        with suppress(OSError, Timeout), lock.acquire(timeout=0):
            if _last_change(folder) < limit:
                shutil.rmtree(folder)


def _last_change(folder: Path) -> float:
    return max(entry.stat().st_mtime for entry in [folder, *folder.rglob("*")])
