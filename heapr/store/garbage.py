"""What nobody needs any more: artifacts without a run, damaged copies, leftovers of killed processes.

In: the store's folder. Out: a list of it, and its removal. An artifact that is in use, by its lock, stays.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import Timeout

from heapr.errors import ConfigError
from heapr.files import remove
from heapr.locks import lock_of
from heapr.store.inventory import Entry, entries, made_from, size_of
from heapr.store.leftovers import damaged_copies, remove_leftovers
from heapr.store.publishing import lock_path
from heapr.store.references import REFERENCES, needs_of_runs, stale_references, with_upstream


@dataclass(frozen=True)
class Garbage:
    """What can be removed.

    Attributes:
        artifacts: that no run needs, directly or because another artifact was made from them; and those that
            were asked for.
        copies: damaged artifacts that were moved aside.
        references: of runs whose folders are gone.
    """

    artifacts: list[Entry]
    copies: list[Path]
    references: list[Path]

    @property
    def num_bytes(self) -> int:
        of_artifacts = sum(entry.num_bytes for entry in self.artifacts)
        return of_artifacts + sum(size_of(copy) for copy in self.copies)


def find_garbage(root: Path, also: Collection[str] = ()) -> Garbage:
    """List what can be removed.

    Args:
        root: the store's folder.
        also: names of artifacts to remove although runs need them, with everything that was made from them.

    Raises:
        ConfigError: a file that should say what a run needs cannot be read.
    """
    needed = needed_artifacts(root)
    found = entries(root)
    asked = _with_made_from(also, made_from(found))
    unneeded = [entry for entry in found if entry.name in asked or entry.name not in needed]
    return Garbage(unneeded, damaged_copies(root), stale_references(root))


def needed_artifacts(root: Path) -> set[str]:
    """Names of the artifacts that runs need, and of those that these were made from.

    Raises:
        ConfigError: see `find_garbage`.
    """
    needs, unreadable = needs_of_runs(root)
    if unreadable:
        raise ConfigError(
            f"cannot tell what a run needs: {unreadable[0]}; nothing is removed as long as that, or the"
            " folder of its run, is there"
        )
    of_runs = {name for artifacts in needs.values() for name in artifacts}
    upstream = {entry.name: entry.upstream for entry in entries(root)}
    return with_upstream(of_runs, upstream)


def remove_garbage(root: Path, garbage: Garbage, also: Collection[str] = ()) -> list[Path]:
    """Remove what was listed, unless it is in use or a run has come to need it since.

    Args:
        root: the store's folder.
        garbage: what `find_garbage` listed.
        also: as for `find_garbage`.

    Returns:
        what was removed.
    """
    removed = []
    asked = _with_made_from(also, made_from(entries(root)))
    needed, changed = needed_artifacts(root), _last_reference(root)
    for entry in reversed(garbage.artifacts):  # what was made from others goes before them
        if _last_reference(root) != changed:
            needed, changed = needed_artifacts(root), _last_reference(root)
        with suppress(Timeout), lock_of(lock_path(entry.path)).acquire(timeout=0):
            if entry.name in asked or entry.name not in needed:
                _remove_artifact(entry.path)
                removed.append(entry.path)
    for path in [*garbage.copies, *garbage.references]:
        remove(path)
        removed.append(path)
    return removed + remove_leftovers(root)


def _last_reference(root: Path) -> int:
    """When a run last recorded what it needs."""
    folder = root / REFERENCES
    return folder.stat().st_mtime_ns if folder.is_dir() else 0


def _remove_artifact(path: Path) -> None:
    """Remove an artifact so that no reader finds half of it."""
    gone = path.parent / f".{path.name}.tmp-{os.getpid()}"
    os.rename(path, gone)
    remove(gone)


def _with_made_from(names: Iterable[str], users: dict[str, list[str]]) -> set[str]:
    """Artifacts, and everything that was made from them."""
    return with_upstream(list(names), users)
