"""Which artifacts runs need: what each run records in the store, and what summaries of runs and sweeps say.

In: folders of runs. Out: "<stage>/<key>" of the artifacts that they need. A reference counts as long as the
run's folder is there.
"""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
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
        the needs of each run; and a line for each file that should say so and cannot be read.
    """
    needs: Needs = defaultdict(set)
    unreadable = []
    for file in [*_records(root), *_summaries(root.parent)]:
        found = _needs_of(file, root)
        if found is None:
            unreadable.append(f"'{file}' is damaged")
            continue
        folder, artifacts = found
        if folder.is_dir():
            needs[folder] |= artifacts
    return dict(needs), unreadable


def stale_references(root: Path) -> list[Path]:
    """Records of runs whose folders are gone."""
    found = {record: _needs_of(record, root) for record in _records(root)}
    return [record for record, needs in found.items() if needs is not None and not needs[0].is_dir()]


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


def _records(root: Path) -> list[Path]:
    return sorted((root / REFERENCES).glob("[!.]*.json"))


def _summaries(outputs: Path) -> Iterator[Path]:
    yield from sorted(outputs.glob(f"{RUNS}/*/{SUMMARY}"))
    yield from sorted(outputs.glob(f"{SWEEPS}/*/*/{SUMMARY}"))


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
