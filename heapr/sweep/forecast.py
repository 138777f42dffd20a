"""What a sweep would do: the steps of every job, those that are cached or shared, and the expected time.

In: the checked configuration of every job. Out: `Forecast`, printed as a table. Nothing is loaded, tokenized
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

EXPENSIVE = ("calibrate", "evaluate")  # worth waiting for, where several jobs need the same one
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
        seconds: expected for each distinct artifact that is missing, by id; None if nothing like it was made
            before.
        flops: forward and backward, of each calibration whose seconds are None, by id; None if they are not
            known for the family.
    """

    jobs: Sequence[JobForecast]
    seconds: Mapping[str, float | None]
    flops: Mapping[str, int | None]

    def to_make(self) -> dict[str, StepState]:
        """Return the distinct artifacts and parts that are missing, by id."""
        return {step.id: step for job in self.jobs for step in job.steps if not step.cached}

    def expensive_to_make(self) -> list[list[str]]:
        """Return, for every job, the ids of its calibrations and evaluations that are missing."""
        expensive = []
        for job in self.jobs:
            missing = [step.id for step in job.steps if not step.cached and step.stage in EXPENSIVE]
            expensive.append(missing)
        return expensive

    def states(self, number: int) -> dict[str, Counter[str]]:
        """Count a job's artifacts by stage and state.

        The states are "cached", "shared" (an earlier job makes it) and "make".
        """
        earlier = {step.id for job in self.jobs[:number] for step in job.steps}
        states: dict[str, Counter[str]] = {name: Counter() for name in STAGES}
        for step in self.jobs[number].steps:
            if step.cached:
                state = "cached"
            elif step.id in earlier:
                state = "shared"
            else:
                state = "make"
            states[step.stage][state] += 1
        return states


def forecast_sweep(jobs: Sequence[tuple[str, ...]], configs: Sequence[ExperimentConfig]) -> Forecast:
    """Forecast all jobs of a sweep.

    Args:
        jobs: overrides of each.
        configs: checked configuration of each.
    """
    ahead = [_forecast_job(overrides, config) for overrides, config in zip(jobs, configs, strict=True)]
    past = PastSeconds(Path(configs[0].paths.outputs) / ARTIFACTS)
    seconds: dict[str, float | None] = {}
    for job in ahead:
        for step in job.steps:
            if not step.cached:
                seconds[step.id] = past.expected(step, job.steps)
    return Forecast(ahead, seconds, _flops_of_calibrations(ahead, configs, seconds))


def _flops_of_calibrations(
    jobs: Sequence[JobForecast], configs: Sequence[ExperimentConfig], seconds: Mapping[str, float | None]
) -> dict[str, int | None]:
    """Return the operations of the calibrations whose seconds are not known.

    A model takes seconds to build on the meta device: it is built once per sequence length.
    """
    flops: dict[str, int | None] = {}
    of_sequence: dict[str, int | None] = {}
    for job, config in zip(jobs, configs, strict=True):
        length = config.calibration.sequence_length
        for step in job.steps:
            is_unknown = step.id in seconds and seconds[step.id] is None
            if step.stage != "calibrate" or not is_unknown or job.source is None:
                continue
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
    """How long artifacts took to make, from the manifests of a store.

    An artifact is compared with those of the same stage and model: a calibration by its time per token, an
    evaluation with those of the same settings.

    Args:
        artifacts: folder of the store's artifacts.
    """

    def __init__(self, artifacts: Path) -> None:
        found = [read_manifest(path.parent) for path in artifacts.glob(f"*/[!.]*/{MANIFEST}")]
        manifests = [manifest for manifest in found if manifest is not None]
        self._models: dict[str, Any] = {}  # of each artifact, by key
        for stage in STAGES:
            for manifest in manifests:
                if manifest["stage"] == stage:
                    self._models[manifest["key"]] = self._model(manifest)
        self._seconds: dict[str, list[float]] = defaultdict(list)
        for manifest in manifests:
            model = self._models[manifest["key"]]
            for part, made in [(WHOLE, manifest), *manifest.get("parts", {}).items()]:
                kind, amount = _kind(manifest["stage"], part, manifest["config"], model)
                self._seconds[kind].append(made["seconds"] / amount)

    def _model(self, manifest: Mapping[str, Any]) -> Any:
        """Return an artifact's model: its own, or the one of the artifact that it was made from."""
        model = manifest["config"].get("model")
        if model:
            return model
        for key in manifest["upstream"].values():
            return self._models.get(key)
        return None

    def expected(self, step: StepState, job: Sequence[StepState]) -> float | None:
        """Return the median time of artifacts like this one; None if there are none.

        Args:
            step: what is to be made.
            job: all steps of its job; the first one's configuration has the model.
        """
        kind, amount = _kind(step.stage, step.part, step.config, job[0].config["model"])
        if kind not in self._seconds:
            return None
        return statistics.median(self._seconds[kind]) * amount


def _kind(stage: str, part: str, config: Mapping[str, Any], model: Any) -> tuple[str, float]:
    """Return a key of artifacts that take equally long per unit of work, and the units of this artifact."""
    amount = config["num_samples"] * config["sequence_length"] if stage == "calibrate" else 1
    settings = config.get("repair") if part == REPAIR_PART else config.get("evaluator")
    return canonical_json([stage, part, model, settings]), amount
