"""The artifact store: every stage's result on disk, under the hash of everything that determines it.

In: an `Origin` (stage, version, resolved configuration, keys of upstream artifacts), a function that computes
the result, and one that writes it into an empty folder. Out: an `Artifact`. Each result is made once: under a
lock, in a temporary folder, published by one rename, and verified when it is read. What is damaged is moved
aside and made again. A killed process leaves a temporary folder, which the next one removes, and its scratch,
from which the next one continues. Several processes of one run compute a result together; rank 0 holds the
lock, decides and writes.

What is made from one artifact alone and may be left out, or fail, is a *part* of it: more files in the same
folder, which are made, verified and described separately, so that their failure loses nothing that was
finished. A complete store is read without writing anything.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from safetensors import SafetensorError

from heapr.errors import ConfigError
from heapr.files import make_folder
from heapr.locks import locked
from heapr.origin import Origin
from heapr.os_errors import one_line_about
from heapr.ranks import ONE_PROCESS, Ranks
from heapr.sealed import DamagedError
from heapr.shared_folder import wait_to_see
from heapr.store.artifact import Artifact
from heapr.store.inspector import Inspector
from heapr.store.leftovers import remove_leftovers, scratch_of
from heapr.store.manifest import MissingError, entry_of, new_manifest, provenance, trusted_manifest
from heapr.store.publishing import (
    add_part,
    empty_folder,
    lock_path,
    publish,
    put_aside,
    put_part_aside,
    rewrite_text,
)
from heapr.store.references import refer
from heapr.store.verify import DamagedPartError, Hashes, verify

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

WHOLE = ""  # in place of a part's name: the artifact itself

T = TypeVar("T")


class Store:
    """Artifacts below one folder, `<root>/<stage>/<key>/`.

    Args:
        root: the folder; created if it does not exist.
        device: its peak memory is measured while an artifact is made.
        ranks: the processes that make artifacts together. All of them call `has` and `get`, in one order.
        wait_minutes: for an artifact that another run is making; None waits as long as it takes.
        full_check: read every file again, whatever is remembered of large ones.
        record: what else the manifests say; it determines no result.

    Raises:
        ConfigError: the folder cannot be created.
    """

    def __init__(
        self,
        root: Path,
        device: torch.device,
        *,
        ranks: Ranks = ONE_PROCESS,
        wait_minutes: float | None = None,
        full_check: bool = False,
        record: Mapping[str, Any] | None = None,
    ) -> None:
        self.root, self.device, self._wait_minutes = root, device, wait_minutes
        self._ranks, self._record = ranks, dict(record or {})
        self._making: set[Path] = set()
        self._hashes = Hashes(None if full_check else self.digests)
        self._inspector = Inspector(self._hashes)
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _cannot_write(root, error) from error

    @property
    def digests(self) -> Path:
        """Folder that remembers the hashes of large files."""
        return self.root / ".digests"

    def path(self, origin: Origin) -> Path:
        """Folder of an artifact, whether or not it has been made."""
        return self.root / origin.stage / origin.key

    def check_writable(self) -> None:
        """Check that artifacts can be made here. To read them takes no more than permission to read.

        Raises:
            ConfigError: the folder is not writable.
        """
        try:
            with tempfile.TemporaryFile(dir=self.root):
                pass
        except OSError as error:
            raise _cannot_write(self.root, error) from error

    def refer(self, folder: Path, origins: Iterable[Origin]) -> None:
        """Record that a run needs artifacts, so that nobody removes them as long as its folder is there.

        Args:
            folder: of the run.
            origins: of its artifacts.
        """
        if self._ranks.is_first:
            names = [f"{origin.stage}/{origin.key}" for origin in origins]
            refer(self.root, folder, names)

    def has(self, origin: Origin, part: str = WHOLE) -> bool:
        """Whether an artifact, or a part of it, is in the store, complete and undamaged."""
        with one_line_about(self.root):
            return self._first_finds_intact(origin, part)

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
        from heapr.measure import StageMeter

        with one_line_about(self.root), StageMeter(self.device) as meter:
            cached = self._first_finds_intact(origin, part) or not self._make_once(
                origin, compute, write, part
            )
        peak = 0 if cached else meter.peak_memory_bytes
        return Artifact(origin.stage, origin.key, part, self.path(origin), cached, meter.seconds, peak)

    def read(self, origin: Origin, reader: Callable[[Path], T], part: str = WHOLE) -> T:
        """Read files of an artifact, or of a part of one, that is in the store.

        Another process may find them damaged at the same time and replace them: they are then read again.
        What is read is checked once more, because `get` may have looked at it hours before.

        Args:
            origin: which artifact.
            reader: reads files in its folder.
            part: whose files they are.

        Raises:
            ConfigError: it is not in the store any more, or has changed.
        """
        path = self.path(origin)
        with one_line_about(self.root):
            with suppress(OSError, SafetensorError, MissingError, DamagedError):
                value = reader(path)
                self._check_what_was_read(path, part)
                return value
            self._wait_for_others(path)
            self._manifest(origin)
            try:
                value = reader(path)
                self._check_what_was_read(path, part)
            except (MissingError, DamagedError) as error:
                raise _lost(origin, error) from error
            return value

    def scratch(self, origin: Origin, part: str = WHOLE) -> Path:
        """A folder for the intermediate results of a computation, which outlives the process; one for each
        rank.

        The next process that computes the same artifact or part finds what a killed one left. The folder is
        removed when the artifact is finished, or `SCRATCH_DAYS` after its last change.

        Call it only inside `compute`, which runs under the artifact's lock, so that nobody else uses the
        folder. A killed process may leave half a file: write with `heapr.files.write_text`, or rename a file
        once it is whole.
        """
        folder = scratch_of(self.path(origin), part)
        make_folder(folder)
        os.utime(folder)
        if self._ranks.size == 1:
            return folder
        of_rank = folder / f"rank-{self._ranks.rank}-of-{self._ranks.size}"
        of_rank.mkdir(exist_ok=True)
        return of_rank

    def rewrite(self, origin: Origin, part: str, name: str, change: Callable[[str], str]) -> None:
        """Change one text file of a part, to add what is known only later.

        Nothing is written if the text stays as it is. Readers, and whoever comes after a process that was
        killed in between, find the part intact, with the old text or the new one.

        Raises:
            ConfigError: the part is not in the store, or it cannot be written.
        """
        path = self.path(origin)
        file = path / name
        with one_line_about(self.root):
            before = file.read_text(encoding="utf-8")
            if change(before) == before:
                return
            with self._locked(path):
                try:
                    manifest = verify(path, part, self._hashes)
                except (MissingError, DamagedError) as error:
                    raise ConfigError(f"{origin.stage} {origin.key} {part} is damaged: {error}") from error
                text = change(file.read_text(encoding="utf-8"))
                rewrite_text(path, manifest, part, name=name, text=text)

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
                self._making.add(path)
                stack.callback(self._making.discard, path)
            if self._first_finds_intact(origin, part):
                return False
            if self._ranks.is_first:
                self._put_damaged_aside(origin, part)
                remove_leftovers(self.root)
                self._make(origin, partial(self._computed_by_all, compute), write, part)
                shutil.rmtree(scratch_of(path, part), ignore_errors=True)
            else:
                self._computed_by_all(compute)
            self._ranks.barrier()
        wait_to_see(path, partial(_is_listed, path, part), self._ranks)
        return True

    def _computed_by_all(self, compute: Callable[[], T]) -> T:
        """What this rank computes, once all have computed: none needs its scratch any more."""
        value = compute()
        self._ranks.barrier()
        return value

    def _make(
        self, origin: Origin, compute: Callable[[], T], write: Callable[[Path, T], None], part: str
    ) -> None:
        """Compute, write and publish the artifact, or a part of it."""
        from heapr.measure import StageMeter

        path = self.path(origin)
        with empty_folder(path) as temporary:
            with StageMeter(self.device) as meter:
                write(temporary, compute())
            described = {**provenance(temporary, meter), **self._record}
            if part:
                add_part(part, temporary, path, manifest=self._manifest(origin), entry=described)
            else:
                publish(temporary, path, new_manifest(origin, described))

    def _put_damaged_aside(self, origin: Origin, part: str) -> None:
        """Move what is damaged out of the way of what will be made. The lock is held."""
        path = self.path(origin)
        try:
            verify(path, part, self._hashes)
        except MissingError:
            if part:
                self._manifest(origin)
        except DamagedPartError:
            aside = put_part_aside(part, path, self._manifest(origin))
            logger.warning("%s %s: the damaged %s is kept in %s", origin.stage, origin.key, part, aside)
        except DamagedError:
            if part:
                self._manifest(origin)
                return
            aside = put_aside(path)
            logger.warning("%s %s: the damaged one is kept in %s", origin.stage, origin.key, aside)

    def _check_what_was_read(self, path: Path, part: str) -> None:
        """Check an artifact or a part as `verify` does; only rank 0 does, for all that read it."""
        if self._ranks.is_first:
            verify(path, part, self._hashes)

    def _first_finds_intact(self, origin: Origin, part: str) -> bool:
        """Whether rank 0 finds an artifact complete and undamaged; all ranks go by that."""
        is_intact = self._ranks.is_first and self._inspector.is_intact(self.path(origin), part)
        return self._ranks.of_first(is_intact)

    def _manifest(self, origin: Origin) -> dict[str, Any]:
        """The manifest of an artifact to which a part is added.

        Raises:
            ConfigError: somebody removed or damaged the artifact meanwhile.
        """
        try:
            return trusted_manifest(self.path(origin))
        except (MissingError, DamagedError) as error:
            raise _lost(origin, error) from error

    def _wait_for_others(self, path: Path) -> None:
        """Wait until no other process makes an artifact."""
        if path not in self._making and os.access(path.parent, os.W_OK):
            with self._locked(path):
                pass

    def _locked(self, path: Path) -> AbstractContextManager[None]:
        """Hold the lock of the artifact in a folder."""
        what = f"{path.parent.name} {path.name}"
        return locked(lock_path(path), what, wait_minutes=self._wait_minutes)


def _cannot_write(root: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"cannot write '{root}': {error.strerror}; choose another folder with paths.outputs=..."
    )


def _lost(origin: Origin, error: MissingError | DamagedError) -> ConfigError:
    what = str(error) or "it is gone"
    return ConfigError(
        f"{origin.stage} {origin.key} was removed or damaged while the run needed it ({what}); start again,"
        " and it is made again"
    )


def _is_listed(path: Path, part: str) -> bool:
    """Whether an artifact has a manifest, with an entry for the part."""
    try:
        entry_of(trusted_manifest(path), part)
    except (OSError, MissingError, DamagedError):
        return False
    return True
