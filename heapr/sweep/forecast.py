"""What a sweep would do: which steps every job takes, which the store has, which several jobs share, and how
long the rest takes.

In: the checked configuration of every job. Out: `Forecast`, printed as a table. Nothing is loaded, tokenised
or made.
"""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heapr.artifacts import ARTIFACTS, MANIFEST, REPAIR_PART, read_manifest
from heapr.dry_run import StepState, sequence_flops, step_states
from heapr.errors import ConfigError
from heapr.experiment import prepare
from heapr.model.load import ModelSource
from heapr.origin import canonical_json
from heapr.schema import ExperimentConfig
from heapr.store import WHOLE

STAGES = ("calibrate", "score", "prune", "evaluate")


@dataclass(frozen=True)
class JobForecast:
    """One job.

    Attributes:
        overrides: of its configuration.
        steps: all its artifacts, in order.
        problem: why it would fail, or why its keys are not known; empty if it can be run.
        source: the model; None if it was not found.
    """

    overrides: tuple[str, ...]
    steps: Sequence[StepState]
    problem: str = ""
    source: ModelSource | None = None


@dataclass(frozen=True)
class Forecast:
    """All jobs, and what is left to make.

    Attributes:
        jobs: in their order.
        seconds: expected for each distinct artifact that is not there, by id; None if nothing like it was
            made before.
        flops: of each calibration of which that is so, forward and backward, by id; None if not known for the
            family.
    """

    jobs: Sequence[JobForecast]
    seconds: Mapping[str, float | None]
    flops: Mapping[str, int | None]

    def to_make(self) -> dict[str, StepState]:
        """Distinct artifacts and parts that are not there, by id."""
        return {step.id: step for job in self.jobs for step in job.steps if not step.cached}

    def states(self, number: int) -> dict[str, Counter[str]]:
        """How many artifacts of each stage of a job are "cached", to "make", or "shared": made by an earlier
        job."""
        earlier = {step.id for job in self.jobs[:number] for step in job.steps}
        states: dict[str, Counter[str]] = {name: Counter() for name in STAGES}
        for step in self.jobs[number].steps:
            states[step.stage]["cached" if step.cached else "shared" if step.id in earlier else "make"] += 1
        return states


def forecast_sweep(jobs: Sequence[tuple[str, ...]], configs: Sequence[ExperimentConfig]) -> Forecast:
    """Look ahead at all jobs.

    Args:
        jobs: overrides of each.
        configs: checked configuration of each.
    """
    ahead = [_forecast_job(overrides, config) for overrides, config in zip(jobs, configs, strict=True)]
    past = PastSeconds(Path(configs[0].paths.outputs) / ARTIFACTS)
    seconds = {
        step.id: past.expected(step, job.steps) for job in ahead for step in job.steps if not step.cached
    }
    return Forecast(ahead, seconds, _flops_of_calibrations(ahead, configs, seconds))


def _flops_of_calibrations(
    jobs: Sequence[JobForecast], configs: Sequence[ExperimentConfig], seconds: Mapping[str, float | None]
) -> dict[str, int | None]:
    """Of those whose seconds are not known. A model takes seconds on the meta device, so each is asked once
    for a length."""
    flops: dict[str, int | None] = {}
    of_sequence: dict[str, int | None] = {}
    for job, config in zip(jobs, configs, strict=True):
        for step in job.steps:
            if step.stage != "calibrate" or seconds.get(step.id, 0.0) is not None or job.source is None:
                continue
            length = config.calibration.sequence_length
            model = canonical_json([job.source.identity, length])
            if model not in of_sequence:
                of_sequence[model] = sequence_flops(job.source.on_meta(), length)
            one = of_sequence[model]
            flops[step.id] = None if one is None else config.calibration.num_samples * one
    return flops


def _forecast_job(overrides: tuple[str, ...], config: ExperimentConfig) -> JobForecast:
    notes: list[str] = []
    try:
        experiment = prepare(config, notes)
    except ConfigError as error:
        return JobForecast(overrides, [], str(error))
    return JobForecast(overrides, step_states(experiment), "; ".join(notes), experiment.source)


class PastSeconds:
    """How long artifacts took, from the manifests of a store.

    A stage is compared with those of the same model: calibrations per token, evaluations with those that
    measured the same.
    """

    def __init__(self, artifacts: Path) -> None:
        found = [read_manifest(path.parent) for path in artifacts.glob(f"*/[!.]*/{MANIFEST}")]
        manifests = [manifest for manifest in found if manifest is not None]
        self._models: dict[str, Any] = {}  # of each artifact, by key
        for stage in STAGES:
            for manifest in manifests:
                if manifest["stage"] == stage:
                    upstream = [self._models.get(key) for key in manifest["upstream"].values()]
                    self._models[manifest["key"]] = manifest["config"].get("model") or next(
                        iter(upstream), None
                    )
        self._seconds: dict[str, list[float]] = defaultdict(list)
        for manifest in manifests:
            model = self._models[manifest["key"]]
            for part, made in [(WHOLE, manifest), *manifest.get("parts", {}).items()]:
                kind, amount = _kind(manifest["stage"], part, manifest["config"], model)
                self._seconds[kind].append(made["seconds"] / amount)

    def expected(self, step: StepState, job: Sequence[StepState]) -> float | None:
        """Median of those like it; None if there are none.

        Args:
            step: what is to be made.
            job: all steps of its job, of which the first says the model.
        """
        kind, amount = _kind(step.stage, step.part, step.config, job[0].config["model"])
        return statistics.median(self._seconds[kind]) * amount if kind in self._seconds else None


def _kind(stage: str, part: str, config: Mapping[str, Any], model: Any) -> tuple[str, float]:
    """What takes equally long, and how much of it there is."""
    amount = config["num_samples"] * config["sequence_length"] if stage == "calibrate" else 1
    settings = config.get("repair") if part == REPAIR_PART else config.get("evaluator")
    return canonical_json([stage, part, model, settings]), amount
