"""What a report is made from: the jobs of a sweep, failed ones too, and the contents of their artifacts.

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
        folder: of the job; None if it never started.
        summary: as in summary.json; None if the job failed or never ran.
        error: why there is no summary, in one line.
    """

    number: int
    overrides: tuple[str, ...]
    folder: Path | None
    summary: Mapping[str, Any] | None
    error: str | None

    @property
    def config(self) -> Mapping[str, Any]:
        """Return the resolved configuration; for a failed job, as far as its folder has it."""
        if self.summary is not None:
            return dict(self.summary["config"])
        if self.folder is None:
            return {}
        path = self.folder / CONFIG
        if not path.is_file():
            return {}
        return yaml.safe_load(path.read_text(encoding="utf-8")) or {}

    @property
    def metrics(self) -> Mapping[str, Mapping[str, float]]:
        """Return the metrics by group, as in summary.json; empty without a summary."""
        return {} if self.summary is None else self.summary["metrics"]


Jobs = Sequence[JobResult]


@dataclass(frozen=True)
class LayerRemoval:
    """Shares of atomic experts removed from a layer.

    Attributes:
        layer: index of the decoder layer.
        share: removed from the whole layer.
        share_E: removed from each expert.
    """

    layer: int
    share: float
    share_E: tuple[float, ...]


def finished(jobs: Jobs) -> list[JobResult]:
    return [job for job in jobs if job.summary is not None]


def stage_entries(job: JobResult, stage: str) -> list[Mapping[str, Any]]:
    """Return the entries of summary.json for a stage, or for an evaluation by its name."""
    stages = [] if job.summary is None else job.summary["stages"]
    return [entry for entry in stages if stage in {entry["stage"], entry.get("what")}]


def stage_folder(job: JobResult, stage: str) -> Path | None:
    """Return the folder of a stage's artifact, or of an evaluation's by its name; None if there is none."""
    folders = [artifact_folder(job, entry) for entry in stage_entries(job, stage)]
    existing = [folder for folder in folders if folder.is_dir()]
    return existing[0] if existing else None


def artifact_folder(job: JobResult, entry: Mapping[str, Any]) -> Path:
    """Return the folder of an artifact, as the entry of its stage gives it.

    Relative paths start at the folder in which the sweep was started: our working directory, or a folder
    above the job's.
    """
    above = [] if job.folder is None else job.folder.resolve().parents
    starts = [Path.cwd(), *above]
    places: list[Path] = [start / entry["path"] for start in starts]
    for place in places:
        if place.is_dir():
            return place
    return places[0]


def details(job: JobResult, evaluation: str) -> Mapping[str, Any] | None:
    """Return details.json of an evaluation by its name; None if it was not run."""
    folder = stage_folder(job, evaluation)
    return None if folder is None else read_details(folder)


def removed_by_layer(job: JobResult) -> list[LayerRemoval] | None:
    """Return what was removed from each layer, in order of layers.

    It is read from the `routing` evaluation or, without one, from the plan; None if neither is there.
    """
    routing = details(job, "routing")
    if routing is not None:
        return removals(routing["layers"])
    layers = []
    folder = stage_folder(job, "prune")
    plan = None if folder is None else read_kept(folder)
    if plan is None:
        return None
    for number, kept_EF in sorted(plan.items()):
        share = float(1 - kept_EF.mean())
        removed_E = 1 - kept_EF.mean(axis=1)
        layers.append(LayerRemoval(number, share, tuple(removed_E.tolist())))
    return layers


def removals(layers: Sequence[Mapping[str, Any]]) -> list[LayerRemoval]:
    """Return what was removed from layers that `heapr.evaluation.routing` described."""
    found = []
    for layer in layers:
        share_E = tuple(1 - ratio for ratio in layer["kept_ratio"])
        found.append(LayerRemoval(layer["layer"], 1 - layer["layer_kept_ratio"], share_E))
    return found


def stage_cost(job: JobResult, stage: str, quantity: str) -> float | None:
    """Return what it took to make a stage's artifact; None if that is not known.

    It is read from the manifest or, without one, from the summary of the job that made the artifact.

    Args:
        job: that used the artifact.
        stage: its name.
        quantity: `seconds` or `peak_memory_bytes`.
    """
    entries = stage_entries(job, stage)
    return _cost(job, entries[0], quantity) if entries else None


def artifact_seconds(jobs: Jobs) -> dict[str, float]:
    """Return the seconds that it took to make each artifact, or part of one, that the jobs used."""
    found: dict[str, float] = {}
    for job in finished(jobs):
        assert job.summary is not None
        for entry in job.summary["stages"]:
            name = f"{entry['key']}/{entry.get('part', '')}"
            seconds = None if name in found else _cost(job, entry, "seconds")
            if seconds is not None:
                found[name] = seconds
    return found


def pruning_time_ratio(job: JobResult) -> float | None:
    """Return the time to prune divided by the time of the first calibration.

    The time to prune is the sum over all rounds' calibrations, scores, plans and repairs. Cached artifacts
    count with the time that it took to make them. None if any of these times is not known.
    """
    seconds = _pruning_costs(job, "seconds")
    first = stage_cost(job, "calibrate", "seconds")
    return sum(seconds) / first if seconds and first else None


def pruning_peak_memory_bytes(job: JobResult) -> float | None:
    """Return the largest peak memory among the stages that made the plan; None if one is not known."""
    return max(_pruning_costs(job, "peak_memory_bytes"), default=None)


def _pruning_costs(job: JobResult, quantity: str) -> list[float]:
    """Return the costs of the plan and the repair, one per artifact; empty if one is not known."""
    costs = []
    for stage in PRUNING_STAGES:
        for entry in stage_entries(job, stage):
            if entry.get("part") == CHECKPOINT_PART:
                continue
            cost = _cost(job, entry, quantity)
            if cost is None:
                return []
            costs.append(cost)
    return costs


def _cost(job: JobResult, entry: Mapping[str, Any], quantity: str) -> float | None:
    """Return what an artifact cost: by its manifest, else by the stage's entry if this job made it."""
    described = read_manifest(artifact_folder(job, entry))
    made: dict[str, Any] = {} if entry["cached"] else dict(entry)
    if described is not None:
        part = entry.get("part")
        of_part = described["parts"].get(part, {}) if part else described
        made |= of_part
    value = made.get(quantity)
    return None if value is None else float(value)
