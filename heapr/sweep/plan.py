"""What a sweep would do: which stages every job needs, which the store has, which several jobs share, and how long it takes.

In: the checked configuration of every job. Out: `Plan`, printed as a table. Nothing is loaded, tokenised or made.
"""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from heapr.artifacts import ARTIFACTS, MANIFEST, REPAIR_PART, read_manifest
from heapr.dry_run import PlannedStage, plan_stages, sequence_flops
from heapr.errors import ConfigError
from heapr.model.load import ModelSource
from heapr.schema import ExperimentConfig
from heapr.store import WHOLE, canonical_json

STAGES = ("calibrate", "score", "prune", "evaluate")


@dataclass(frozen=True)
class PlannedJob:
    """One job.

    Attributes:
        overrides: of its configuration.
        stages: all its artifacts, in order.
        seconds: how long each artifact took before, where something like it was made.
        problem: why it would fail, or why its keys are not known; empty if it can be run.
        source: the model; none if it was not found.
    """

    overrides: tuple[str, ...]
    stages: Sequence[PlannedStage]
    problem: str = ""
    source: ModelSource | None = None


@dataclass(frozen=True)
class SweepPlan:
    """All jobs, and what is left to make.

    Attributes:
        jobs: in their order.
        seconds: expected for each distinct artifact that is not there, by name; none if nothing like it was made before.
        flops: of each calibration of which that is so, forward and backward, by name; none if not known for the family.
    """

    jobs: Sequence[PlannedJob]
    seconds: Mapping[str, float | None]
    flops: Mapping[str, int | None]

    def to_make(self) -> dict[str, PlannedStage]:
        """Distinct artifacts and parts that are not there, by name."""
        return {stage.name: stage for job in self.jobs for stage in job.stages if not stage.cached}

    def states(self, number: int) -> dict[str, Counter[str]]:
        """How many artifacts of each stage of a job are "cached", to "make", or "shared": made by an earlier job."""
        earlier = {stage.name for job in self.jobs[:number] for stage in job.stages}
        states: dict[str, Counter[str]] = {name: Counter() for name in STAGES}
        for stage in self.jobs[number].stages:
            states[stage.stage]["cached" if stage.cached else "shared" if stage.name in earlier else "make"] += 1
        return states


def plan_sweep(jobs: Sequence[tuple[str, ...]], configs: Sequence[ExperimentConfig]) -> SweepPlan:
    """Plan all jobs.

    Args:
        jobs: overrides of each.
        configs: checked configuration of each.
    """
    planned = [_plan_job(overrides, config) for overrides, config in zip(jobs, configs, strict=True)]
    past = PastSeconds(Path(configs[0].paths.outputs) / ARTIFACTS)
    seconds = {stage.name: past.expected(stage, job.stages) for job in planned for stage in job.stages if not stage.cached}
    return SweepPlan(planned, seconds, _flops_of_calibrations(planned, configs, seconds))


def _flops_of_calibrations(
    jobs: Sequence[PlannedJob], configs: Sequence[ExperimentConfig], seconds: Mapping[str, float | None]
) -> dict[str, int | None]:
    """Of those whose seconds are not known. A model takes seconds on the meta device, so each is asked once for a length."""
    flops: dict[str, int | None] = {}
    of_sequence: dict[str, int | None] = {}
    for job, config in zip(jobs, configs, strict=True):
        for stage in job.stages:
            if stage.stage != "calibrate" or seconds.get(stage.name, 0.0) is not None or job.source is None:
                continue
            length = config.calibration.sequence_length
            model = canonical_json([job.source.identity, length])
            if model not in of_sequence:
                of_sequence[model] = sequence_flops(job.source.on_meta(), length)
            one = of_sequence[model]
            flops[stage.name] = None if one is None else config.calibration.num_samples * one
    return flops


def _plan_job(overrides: tuple[str, ...], config: ExperimentConfig) -> PlannedJob:
    notes: list[str] = []
    try:
        source, _, stages = plan_stages(replace(config, dry_run=True), notes)
    except ConfigError as error:
        return PlannedJob(overrides, [], str(error))
    return PlannedJob(overrides, stages, "; ".join(notes), source)


class PastSeconds:
    """How long artifacts took, from the manifests of a store.

    A stage is compared with those of the same model: calibrations per token, evaluations with those that measured the same.
    """

    def __init__(self, artifacts: Path) -> None:
        found = [read_manifest(path.parent) for path in artifacts.glob(f"*/[!.]*/{MANIFEST}")]
        manifests = [manifest for manifest in found if manifest is not None]
        self._models: dict[str, Any] = {}  # of each artifact, by key
        for stage in STAGES:
            for manifest in manifests:
                if manifest["stage"] == stage:
                    upstream = [self._models.get(key) for key in manifest["upstream"].values()]
                    self._models[manifest["key"]] = manifest["config"].get("model") or next(iter(upstream), None)
        self._seconds: dict[str, list[float]] = defaultdict(list)
        for manifest in manifests:
            model = self._models[manifest["key"]]
            for part, made in [(WHOLE, manifest), *manifest.get("parts", {}).items()]:
                kind, amount = _kind(manifest["stage"], part, manifest["config"], model)
                self._seconds[kind].append(made["seconds"] / amount)

    def expected(self, stage: PlannedStage, job: Sequence[PlannedStage]) -> float | None:
        """Median of those like it; none if there are none.

        Args:
            stage: what is to be made.
            job: all stages of its job, of which the first says the model.
        """
        kind, amount = _kind(stage.stage, stage.part, stage.config, job[0].config["model"])
        return statistics.median(self._seconds[kind]) * amount if kind in self._seconds else None


def _kind(stage: str, part: str, config: Mapping[str, Any], model: Any) -> tuple[str, float]:
    """What takes equally long, and how much of it there is."""
    amount = config["num_samples"] * config["sequence_length"] if stage == "calibrate" else 1
    settings = config.get("repair") if part == REPAIR_PART else config.get("evaluator")
    return canonical_json([stage, part, model, settings]), amount
