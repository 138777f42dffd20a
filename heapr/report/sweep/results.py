"""What a report is made from: the jobs of a sweep, those that failed too, and what the artifacts behind them
hold.

In: jobs. Out: numbers and details of their artifacts.
Shape letters: E experts of a layer, F atomic experts of one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from heapr.artifacts import CHECKPOINT_PART, read_details, read_kept, read_manifest

CONFIG = ".hydra/config.yaml"
PRUNING_STAGES = ("calibrate", "score", "prune")


@dataclass(frozen=True)
class JobResult:
    """One job of a sweep.

    Attributes:
        number: of the job in its sweep.
        overrides: as on the command line.
        folder: of the job; none if it never started.
        summary: as in summary.json; none if the job failed or never ran.
        error: why there is no summary, in one line.
    """

    number: int
    overrides: tuple[str, ...]
    folder: Path | None
    summary: Mapping[str, Any] | None
    error: str | None

    @property
    def config(self) -> Mapping[str, Any]:
        """The resolved configuration; of a failed job, as far as its folder knows it."""
        if self.summary is not None:
            return dict(self.summary["config"])
        path = None if self.folder is None else self.folder / CONFIG
        return (
            (yaml.safe_load(path.read_text(encoding="utf-8")) or {})
            if path is not None and path.is_file()
            else {}
        )

    @property
    def metrics(self) -> Mapping[str, Mapping[str, float]]:
        """By group, as in summary.json; empty if there is no summary."""
        return {} if self.summary is None else self.summary["metrics"]


@dataclass(frozen=True)
class LayerRemoval:
    """Shares of atomic experts removed: of a layer (by decoder layer index), and of each of its experts."""

    layer: int
    share: float
    share_E: tuple[float, ...]


def finished(jobs: Sequence[JobResult]) -> list[JobResult]:
    return [job for job in jobs if job.summary is not None]


def stage_entries(job: JobResult, stage: str) -> list[Mapping[str, Any]]:
    """What summary.json says of a stage, or of an evaluation by its name."""
    stages = [] if job.summary is None else job.summary["stages"]
    return [entry for entry in stages if stage in {entry["stage"], entry.get("what")}]


def stage_folder(job: JobResult, stage: str) -> Path | None:
    """Where the artifact of a stage, or of an evaluation by its name, lies; none if it is not there (any
    more)."""
    folders = [artifact_folder(job, entry) for entry in stage_entries(job, stage)]
    return next((folder for folder in folders if folder.is_dir()), None)


def artifact_folder(job: JobResult, entry: Mapping[str, Any]) -> Path:
    """Where a stage's entry says that its artifact lies.

    A relative path counts from the folder that the sweep was started in: ours, or one above the job's.
    """
    above = [] if job.folder is None else job.folder.resolve().parents
    places: list[Path] = [start / entry["path"] for start in [Path.cwd(), *above]]
    return next((place for place in places if place.is_dir()), places[0])


def details(job: JobResult, evaluation: str) -> Mapping[str, Any] | None:
    """details.json of an evaluation by its name; none if it was not made."""
    folder = stage_folder(job, evaluation)
    return None if folder is None else read_details(folder)


def removed_by_layer(job: JobResult) -> list[LayerRemoval] | None:
    """In order of layers; none if neither the `routing` evaluation nor the plan is there."""
    routing = details(job, "routing")
    if routing is not None:
        return [
            LayerRemoval(
                layer["layer"],
                1 - layer["layer_kept_ratio"],
                tuple(1 - ratio for ratio in layer["kept_ratio"]),
            )
            for layer in routing["layers"]
        ]
    folder = stage_folder(job, "prune")
    plan = None if folder is None else read_kept(folder)
    if plan is None:
        return None
    return [
        LayerRemoval(i, float(1 - plan[i].mean()), tuple((1 - plan[i].mean(axis=1)).tolist()))
        for i in sorted(plan)
    ]


def stage_cost(job: JobResult, stage: str, quantity: str) -> float | None:
    """`seconds` or `peak_memory_bytes` that making a stage took, when it was made; none if that is not known.

    The manifest says it; without one, the summary of the job that made the stage does.
    """
    entries = stage_entries(job, stage)
    return _cost(job, entries[0], quantity) if entries else None


def pruning_time_ratio(job: JobResult) -> float | None:
    """Seconds of everything that made the plan (all rounds' calibrations, scores, plans and repairs), in
    units of the first calibration's.

    Of making them, whether or not this job found them made. None if that of any is not known.
    """
    seconds = _pruning_costs(job, "seconds")
    first = stage_cost(job, "calibrate", "seconds")
    return sum(seconds) / first if seconds and first else None


def pruning_peak_memory_bytes(job: JobResult) -> float | None:
    """Peak memory of making the plan: of the stage that took most. None if that of any is not known."""
    return max(_pruning_costs(job, "peak_memory_bytes"), default=None)


def _pruning_costs(job: JobResult, quantity: str) -> list[float]:
    """Of everything that made the plan and repaired the weights; none if one is not known."""
    entries = [
        entry
        for stage in PRUNING_STAGES
        for entry in stage_entries(job, stage)
        if entry.get("part") != CHECKPOINT_PART
    ]
    costs = [_cost(job, entry, quantity) for entry in entries]
    known = [cost for cost in costs if cost is not None]
    return known if len(known) == len(costs) else []


def _cost(job: JobResult, entry: Mapping[str, Any], quantity: str) -> float | None:
    described = read_manifest(artifact_folder(job, entry))
    made: dict[str, Any] = {} if entry["cached"] else dict(entry)
    if described is not None:
        part = entry.get("part")
        made |= described["parts"].get(part, {}) if part else described
    value = made.get(quantity)
    return None if value is None else float(value)
