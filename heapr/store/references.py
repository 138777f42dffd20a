"""Which artifacts runs need: what each run records in the store, and what summaries of runs and sweeps say.

In: folders of runs. Out: "<stage>/<key>" of the artifacts that they need. A reference counts as long as the
run's folder is there.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections import defaultdict
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path

from heapr.artifacts import RUNS, SUMMARY, SWEEPS, read_summary
from heapr.files import write_text
from heapr.sealed import DamagedError, read_sealed, sealed_text

REFERENCES = ".runs"  # folder in the store

Needs = dict[Path, set[str]]  # "<stage>/<key>" of artifacts by the folder of the run that needs them


def refer(root: Path, folder: Path, artifacts: Collection[str]) -> None:
    """Record what a run needs; nothing if the store cannot be written.

    Args:
        root: the store's folder.
        folder: of the run.
        artifacts: "<stage>/<key>" of each.
    """
    place = os.path.relpath(folder.resolve(), root.resolve())
    name = hashlib.sha256(place.encode()).hexdigest()
    record = root / REFERENCES / f"{name}.json"
    with suppress(OSError):
        record.parent.mkdir(exist_ok=True)
        write_text(record, sealed_text({"folder": place, "artifacts": sorted(set(artifacts))}))


def needs_of_runs(root: Path) -> tuple[Needs, list[str]]:
    """What the runs need that are still there.

    Args:
        root: the store's folder, beside those of runs and sweeps.

    Returns:
        the needs of each run; and a line for each file that should say so, or folder of such files, that
        cannot be read.
    """
    needs: Needs = defaultdict(set)
    unreadable: list[str] = []
    for file in [*_records(root, unreadable), *_summaries(root.parent, unreadable)]:
        found = _needs_of(file, root)
        if found is None:
            unreadable.append(f"'{file}' is damaged")
            continue
        folder, artifacts = found
        if _may_be_there(folder):
            needs[folder] |= artifacts
    return dict(needs), unreadable


def stale_references(root: Path) -> list[Path]:
    """Records of runs whose folders are gone."""
    found = {record: _needs_of(record, root) for record in _records(root, [])}
    return [record for record, needs in found.items() if needs is not None and not _may_be_there(needs[0])]


def with_upstream(needed: Collection[str], upstream: Mapping[str, Collection[str]]) -> set[str]:
    """Artifacts and everything that they were made from.

    Args:
        needed: "<stage>/<key>" of each.
        upstream: the same of what each artifact was made from.
    """
    found: set[str] = set()
    to_do = list(needed)
    while to_do:
        artifact = to_do.pop()
        if artifact not in found:
            found.add(artifact)
            to_do += upstream.get(artifact, ())
    return found


def _records(root: Path, unreadable: list[str]) -> list[Path]:
    names = _names_in(root / REFERENCES, unreadable)
    return [root / REFERENCES / name for name in names if name.endswith(".json") and not name.startswith(".")]


def _summaries(outputs: Path, unreadable: list[str]) -> list[Path]:
    runs = _inside([outputs / RUNS], unreadable)
    jobs = _inside(_inside([outputs / SWEEPS], unreadable), unreadable)
    return [folder / SUMMARY for folder in [*runs, *jobs] if SUMMARY in _names_in(folder, unreadable)]


def _inside(folders: Collection[Path], unreadable: list[str]) -> list[Path]:
    """Whatever lies in these folders."""
    return [folder / name for folder in folders for name in _names_in(folder, unreadable)]


def _names_in(folder: Path, unreadable: list[str]) -> list[str]:
    """Names in a folder; none if it is no folder. One that is closed gets a line."""
    try:
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        unreadable.append(f"'{folder}': {error.strerror}")
        return []


def _may_be_there(folder: Path) -> bool:
    """Whether a run's folder is there, or hidden in one that is closed."""
    try:
        return stat.S_ISDIR(folder.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError):
        return True


def _needs_of(file: Path, root: Path) -> tuple[Path, set[str]] | None:
    """The folder of a run and what it needs, by a record or a summary; None if that is damaged."""
    try:
        if file.name == SUMMARY:
            content = read_summary(file.parent) or {"stages": []}
            return file.parent.resolve(), {f"{entry['stage']}/{entry['key']}" for entry in content["stages"]}
        content = read_sealed(file)
        return Path(os.path.normpath(root.resolve() / content["folder"])), set(content["artifacts"])
    except (OSError, ValueError, DamagedError, KeyError, TypeError, RecursionError):
        return None
