"""What a sweep would do: the steps of every job, those that are cached or shared, and the expected time.

In: the checked configuration of every job. Out: `Forecast`, printed as a table. Nothing is loaded, tokenized
or made.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from heapr.artifacts import ARTIFACTS
from heapr.dry_run import StepState, sequence_flops, step_states
from heapr.errors import ConfigError
from heapr.model.load import ModelSource
from heapr.origin import canonical_json
from heapr.past_seconds import PastSeconds
from heapr.prepare import prepare
from heapr.schema import ExperimentConfig
from heapr.store.inventory import STAGES

EXPENSIVE = ("calibrate", "evaluate")  # worth waiting for, where several jobs need the same one


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
                seconds[step.id] = past.expected(step, model=job.steps[0].config["model"])
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
