"""Runs one experiment: everything around its steps.

In: an experiment's configuration and a folder. Out: a `Summary`, which is also written into the folder; what
is tracked; a GPU that no other job uses meanwhile. How the steps themselves are made is heapr/pipeline.py.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from heapr import artifacts
from heapr.experiment import Experiment
from heapr.gpu_slots import gpu_slot
from heapr.os_errors import one_line_about
from heapr.pipeline import Pipeline
from heapr.prepare import prepare
from heapr.push import check_destination, push
from heapr.ranks import ONE_PROCESS, Ranks
from heapr.ready import make_ready
from heapr.report.run.protocol import protocol_differences
from heapr.schema import ExperimentConfig
from heapr.store.manifest import environment
from heapr.tracking import values
from heapr.tracking.open_tracker import open_tracker
from heapr.tracking.tracker import DENSE, Run, Several, Tracker
from heapr.types import (
    Metrics,
    ProtocolRecord,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Summary:
    """What a run did: the content of `summary.json`.

    Attributes:
        metrics: by contract name, for the "dense" and the "pruned" model, the change of "size", and the
            "comparison" of both models.
        protocols: how each corpus or task was measured on the "dense" and on the "pruned" model.
        coverage: how well the first calibration covers the experts: a `heapr.calibration.coverage.Coverage`.
        super_experts: the dense model's ("found"), each a `heapr.pruning.super_experts.SuperExpert`, and
            whether they lose nothing ("are_protected"). A streamed model's are looked for only if they are
            protected.
        stages: one entry per artifact, in the order in which they were needed.
        config: the whole resolved configuration.
        environment: versions, machine, and the seconds that the run took.
    """

    metrics: dict[str, Metrics]
    protocols: dict[str, dict[str, ProtocolRecord]]
    coverage: dict[str, Any]
    super_experts: dict[str, Any]
    stages: list[dict[str, Any]]
    config: dict[str, Any]
    environment: dict[str, Any]


def run(
    config: ExperimentConfig, folder: Path, *, sweep: str | None = None, ranks: Ranks = ONE_PROCESS
) -> Summary:
    """Run one experiment.

    Args:
        config: checked by `heapr.schema.resolve`.
        folder: the run's own; receives `summary.json` and the tracker's file. Of several processes only that
            of rank 0 is used.
        sweep: name of the sweep that this run is a job of; None for a single run.
        ranks: the processes that share the work, all of which call this.

    Raises:
        ConfigError: the user's mistake, found before the first expensive step; or no space, or permission
            lost, at any time: what was finished is kept.
        FloatingPointError: NaN or infinity; the message says where.
    """
    pruning = config.pruning
    if pruning.push_to is not None and ranks.is_first:
        check_destination(pruning.push_to, is_public=pruning.push_public)
    with one_line_about(Path(config.paths.outputs)), one_line_about(folder):
        return _run(config, folder, sweep=sweep, ranks=ranks)


def _run(config: ExperimentConfig, folder: Path, *, sweep: str | None, ranks: Ranks) -> Summary:
    started = time.perf_counter()
    pruning = config.pruning
    experiment = prepare(config, ranks=ranks)
    needed = [step.origin for step in experiment.steps]
    experiment.store.refer(folder, needed)
    tokens = make_ready(experiment)
    logger.info("%-9s %s, results in %s", "run", experiment.name, folder)
    resolved = asdict(config)
    tracked = _tracked_run(experiment, folder, sweep, resolved)
    with _own_gpu(experiment), _tracker(experiment, tracked, folder) as tracker:
        pipeline = Pipeline(experiment, tracker, tokens)
        pipeline.take(experiment.steps.dense)  # first, because pruning changes the model in place
        dense = pipeline.findings.measured("dense")
        tracker.log(values.under(DENSE, dense))
        pipeline.take(experiment.steps.pruning)
        pipeline.take(experiment.steps.pruned)
        metrics = pipeline.conclude(dense)
        pipeline.log_layers_and_artifacts()
        tracker.log(values.results(metrics, config.pruning.ratio))
    protocols = pipeline.findings.protocols
    for difference in protocol_differences(protocols):
        logger.warning("dense and pruned cannot be compared: %s", difference)
    seconds = round(time.perf_counter() - started, 1)
    assert pipeline.coverage is not None
    summary = Summary(
        metrics=metrics,
        protocols=protocols,
        coverage=asdict(pipeline.coverage),
        super_experts={
            "are_protected": pruning.protect_super_experts,
            "found": [each._asdict() for each in pipeline.super_experts],
        },
        stages=pipeline.stages,
        config=resolved,
        environment=environment(experiment.device) | {"seconds": seconds},
    )
    if experiment.ranks.is_first:
        artifacts.write_summary(folder, asdict(summary))
        if pruning.push_to is not None:
            push(pipeline.checkpoint, pruning.push_to, is_public=pruning.push_public)
    return summary


def _tracker(experiment: Experiment, tracked: Run, folder: Path) -> AbstractContextManager[Tracker]:
    """The run's tracker; one that does nothing for ranks but the first."""
    if not experiment.ranks.is_first:
        return nullcontext(Several())
    config = experiment.config
    return open_tracker(config.tracking, tracked, folder=folder, outputs=Path(config.paths.outputs))


def _own_gpu(experiment: Experiment) -> AbstractContextManager[None]:
    """A GPU that no other job uses meanwhile; none if the store has all results."""
    runtime = experiment.config.runtime
    if all(experiment.store.has(step.origin, step.part) for step in experiment.steps):
        return nullcontext()
    is_spread = runtime.device_map is not None
    return gpu_slot(experiment.device, all_of_them=is_spread, wait_minutes=runtime.wait_minutes)


def _tracked_run(experiment: Experiment, folder: Path, sweep: str | None, resolved: Mapping[str, Any]) -> Run:
    """The run as trackers know it.

    Its id belongs to the experiment and the folder, so that two runs of one experiment stay two. The
    experiment's key is in the configuration: it is the same for both.
    """
    key = experiment.steps.key
    return Run(
        name=experiment.name,
        id=values.run_id(key, str(folder.resolve())),
        job_type="experiment",
        group=sweep,
        tags=tuple(experiment.labels.values()),
        config={**resolved, "labels": experiment.labels, "key": key},
    )
