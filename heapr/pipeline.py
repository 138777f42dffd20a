"""The paper's algorithm, read aloud: calibrate -> score -> prune -> evaluate.

In: an experiment's configuration. Out: a `Summary`. The order of the steps and what each needs is data
(heapr/steps.py); here is how each is made. All go through the artifact store, which answers from disk when it
already holds the result.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from heapr import artifacts
from heapr.artifacts import CARD, CHECKPOINT, CHECKPOINT_PART, REPAIR_PART, Report
from heapr.calibration.collector import collect
from heapr.calibration.coverage import report_coverage
from heapr.evaluation.efficiency import size_change
from heapr.evaluation.measurement import Material, measure
from heapr.evaluation.perplexity import WINDOW_LOSSES, perplexity_increases
from heapr.evaluation.routing import layer_routing
from heapr.evaluation.zero_shot import average_accuracy
from heapr.experiment import Experiment, prepare
from heapr.model.checkpoint import save_checkpoint
from heapr.model.moe import MoEModel
from heapr.progress import progress
from heapr.provider import ModelProvider
from heapr.pruning.allocation import allocate
from heapr.pruning.allocation_report import report_allocation
from heapr.pruning.budget import costs_of
from heapr.pruning.layer_repair import report_repair
from heapr.ready import make_ready
from heapr.report.run.card import model_card
from heapr.report.run.protocol import protocol_differences
from heapr.schema import ExperimentConfig
from heapr.step_results import StepResults
from heapr.steps import Step
from heapr.store import Artifact
from heapr.text.windows import batches
from heapr.tracking import values
from heapr.tracking.open_tracker import open_tracker
from heapr.tracking.tracker import NUM_TOKENS, RATIO, Run, Tracker
from heapr.types import (
    Evaluation,
    ExpertWeights,
    Metrics,
    Plan,
    ProtocolRecord,
    Pruning,
    Scores,
    Statistics,
    TokenWindows,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Summary:
    """What a run did; `summary.json`.

    Attributes:
        metrics: by contract name, of the "dense" and the "pruned" model, the change of "size", and the
            "comparison" of both.
        protocols: of the "dense" and the "pruned" model: how each corpus or task was measured.
        stages: one entry per artifact, in the order in which they were needed.
        config: the whole resolved configuration.
    """

    metrics: dict[str, Metrics]
    protocols: dict[str, dict[str, ProtocolRecord]]
    stages: list[dict[str, Any]]
    config: dict[str, Any]


def run(config: ExperimentConfig, folder: Path, *, sweep: str | None = None) -> Summary:
    """One experiment.

    Args:
        config: checked by `heapr.schema.resolve`.
        folder: of this run; gets `summary.json` and the tracker's file.
        sweep: name of the sweep that this is a job of; none for a single run.

    Raises:
        ConfigError: the user's mistake, found before the first expensive step.
        FloatingPointError: NaN or infinity; the message names where.
    """
    experiment = prepare(config)
    tokens = make_ready(experiment)
    logger.info("%-9s %s, results in %s", "run", experiment.name, folder)
    resolved = asdict(config)
    tracked = _tracked_run(experiment, sweep, resolved)
    with open_tracker(config.tracking, tracked, folder=folder, outputs=Path(config.paths.outputs)) as tracker:
        pipeline = Pipeline(experiment, tracker, tokens)
        pipeline.take(experiment.steps.dense)  # first, because pruning changes the model in place
        dense = pipeline.measured("dense")
        tracker.log({RATIO: 0.0, **dense})
        pipeline.take(experiment.steps.pruning)
        pipeline.take(experiment.steps.pruned)
        metrics = pipeline.conclude(dense)
        pipeline.show()
        tracker.log(
            {RATIO: config.pruning.ratio, **metrics["pruned"], **metrics["size"], **metrics["comparison"]}
        )
    for difference in protocol_differences(pipeline.protocols):
        logger.warning("dense and pruned cannot be compared: %s", difference)
    summary = Summary(metrics=metrics, protocols=pipeline.protocols, stages=pipeline.stages, config=resolved)
    artifacts.write_summary(folder, asdict(summary))
    return summary


class Pipeline:
    """Takes the steps of an experiment; each is answered by the store or made.

    Steps read what they need from the files of earlier ones. The model is loaded when a step first needs it:
    a run that finds everything in the store never does.

    Args:
        experiment: what to do.
        tracker: gets seconds and cache hits of every step, and what happens on the way.
        tokens: to calibrate on; None if the calibration is in the store.
    """

    def __init__(self, experiment: Experiment, tracker: Tracker, tokens: TokenWindows | None) -> None:
        self.experiment, self.tracker = experiment, tracker
        self.stages: list[dict[str, Any]] = []
        self.metrics: dict[str, Metrics] = {"dense": {}, "pruned": {}, "comparison": {}}
        self.protocols: dict[str, dict[str, ProtocolRecord]] = {"dense": {}, "pruned": {}}
        self.window_losses: dict[str, dict[str, list[float]]] = {"dense": {}, "pruned": {}}
        self.models = ModelProvider(
            experiment.load_dense,
            repair=experiment.plugins.repair,
            form=experiment.config.pruning.form,
            uniform_settings=experiment.uniform_settings,
        )
        self.results = StepResults(experiment.store, experiment.steps, tokens)

    def take(self, steps: Sequence[Step]) -> None:
        """One step after the other."""
        make = {
            "calibrate": self.calibrate,
            "score": self.score,
            "prune": self.prune,
            REPAIR_PART: self.repair,
            CHECKPOINT_PART: self.write_checkpoint,
            "evaluate": self.evaluate,
        }
        for step in steps:
            make[step.kind](step)
            self.results.forget(step)

    def calibrate(self, step: Step) -> None:
        """One forward and one backward pass over the calibration tokens; running sums per atomic expert."""

        def compute() -> tuple[TokenWindows, Statistics]:
            tokens, batch_size = self.results.tokens(step), self.experiment.config.calibration.batch_size
            num_batches = math.ceil(len(tokens.ids_NW) / batch_size)
            bar = progress(batches(tokens, batch_size), total=num_batches, description="calibrate")
            return tokens, collect(self._model(step), bar, on_batch=values.CalibrationProgress(self.tracker))

        self._get(step, compute, artifacts.write_calibration)
        statistics: Statistics = self.results.of(step)
        loss = statistics.loss_sum / statistics.num_predicted_tokens
        self.tracker.log({NUM_TOKENS: statistics.num_tokens, "calibration/loss": loss})
        if step is self.experiment.steps.first("calibrate"):
            report_coverage(statistics, self.experiment.source.widths)

    def score(self, step: Step) -> None:
        """The importance of every atomic expert."""

        def weights(index: int) -> ExpertWeights:
            return next(layer.weights() for layer in self._model(step).layers if layer.index == index)

        def compute() -> Scores:
            return self.experiment.plugins.criterion(self.results.statistics(step), weights)

        self._get(step, compute, artifacts.write_scores)

    def prune(self, step: Step) -> None:
        """Which atomic experts go: the lowest-scoring share; from the second round on, of what the round
        before left."""
        source, budget = self.experiment.source, self.experiment.budget

        def compute() -> tuple[Plan, Report]:
            scores = self.results.scores(step)
            statistics = self.results.statistics(step)
            earlier = self.results.pruning(step)
            costs = costs_of(budget.unit, statistics, source.atomic_expert_parameters)
            widths = earlier.plan.widths if earlier else source.widths
            of_round = budget.of_round(step.origin.config["ratio"], widths, source.widths, costs)
            plan = allocate(scores, widths, of_round, costs)
            report = report_allocation(plan, scores, widths, of_round, costs)
            return earlier.plan.then(plan) if earlier else plan, report

        is_repaired = self.experiment.plugins.repair is not None
        artifact = self._get(
            step, compute, partial(artifacts.write_plan, model=source.identity, is_repaired=is_repaired)
        )
        self._tell(artifacts.read_allocation(artifact.path))

    def repair(self, step: Step) -> None:
        """The kept weights make up for what is removed."""

        def compute() -> tuple[Pruning, Report]:
            plan = self.results.plan(step)
            tokens, batch_size = self.results.tokens(step), self.experiment.config.calibration.batch_size
            pruning, found = self.models.repaired(
                plan, self.results.pruning(step), lambda: list(batches(tokens, batch_size))
            )
            return pruning, report_repair(found)

        artifact = self._get(step, compute, artifacts.write_repair)
        self._tell(artifacts.read_repair(artifact.path))

    def write_checkpoint(self, step: Step) -> None:
        """The pruned model, with a card and the plan, as a folder that transformers loads."""
        experiment = self.experiment

        def write(folder: Path, model: MoEModel) -> None:
            save_checkpoint(model, experiment.source.folder, folder / CHECKPOINT, about=experiment.about)
            (folder / CHECKPOINT / CARD).write_text(model_card(experiment.about, {}), encoding="utf-8")
            plans = folder / CHECKPOINT / artifacts.PLANS
            plans.mkdir()
            shutil.copy(self.results.folder(step) / artifacts.PLAN, plans)

        self._get(step, lambda: self._final_model(step), write)

    def evaluate(self, step: Step) -> None:
        """What a measurement finds on the dense or the pruned model, or between them."""

        def compute() -> Evaluation:
            assert step.measurement is not None
            return measure(step.measurement, self._material(step))

        found = artifacts.read_evaluation(self._get(step, compute, artifacts.write_evaluation).path)
        self.metrics[step.variant] |= found.metrics
        if step.variant != "comparison":
            self.protocols[step.variant] |= found.details.get("protocols", {})
            self.window_losses[step.variant] |= found.details.get(WINDOW_LOSSES, {})

    def measured(self, variant: str) -> Metrics:
        """Metrics of the "dense" or the "pruned" model, averages over tasks among them."""
        names = [measurement.name for measurement in self.experiment.plugins.measurements]
        return self.metrics[variant] | average_accuracy(names, self.metrics[variant])

    def conclude(self, dense: Metrics) -> dict[str, Metrics]:
        """All metrics; the card of the checkpoint tells them too."""
        experiment, pruned = self.experiment, self.measured("pruned")
        plan: Plan = self.results.of(experiment.steps.last("prune"))
        increases = perplexity_increases(self.window_losses["dense"], self.window_losses["pruned"])
        removed = {"atomic_experts_removed_ratio": 1 - plan.num_kept / experiment.source.num_atomic_experts}
        metrics = {
            "dense": dense,
            "pruned": pruned,
            "size": removed | size_change(dense, pruned),
            "comparison": increases | self.metrics["comparison"],
        }
        if experiment.config.pruning.save_checkpoint:
            card = partial(model_card, experiment.about, metrics)
            checkpoint = experiment.steps.last(CHECKPOINT_PART)
            experiment.store.rewrite(checkpoint.origin, checkpoint.part, f"{CHECKPOINT}/{CARD}", card)
        return metrics

    def show(self) -> None:
        """Layers and artifacts, for whoever looks at the run."""
        steps, widths = self.experiment.steps, self.experiment.source.widths
        statistics, plan = self.results.of(steps.first("calibrate")), self.results.of(steps.last("prune"))
        layers = [layer_routing(index, plan, width_E, statistics) for index, width_E in widths.items()]
        self.tracker.log({"layers": values.layer_table(layers), **values.artifacts(self.stages)})

    def _get(self, step: Step, compute: Callable[[], T], write: Callable[[Path, T], None]) -> Artifact:
        """Answer from the store or make it; one log line either way."""
        stage, what = step.origin.stage, step.what
        artifact = self.experiment.store.get(step.origin, compute, write, step.part)
        self.stages.append({"stage": stage, "what": what, **artifact.summary()})
        how = (
            "cached" if artifact.cached else f"made, peak memory {artifact.peak_memory_bytes / 2**30:.2f} GiB"
        )
        logger.info(
            "%-9s %s%s: %s, %.1f s", stage, f"{what} " if what else "", artifact.key, how, artifact.seconds
        )
        measured = {
            "seconds": artifact.seconds,
            "cached": artifact.cached,
            "peak_memory_bytes": artifact.peak_memory_bytes,
        }
        name = "/".join(["stages", stage, *what.split()])
        self.tracker.log({f"{name}/{number}": value for number, value in measured.items()})
        return artifact

    def _tell(self, report: Report) -> None:
        """Log what a report says in words."""
        for line in report["summary"]:
            logger.info("%-9s %s", "prune", line)
        for line in report["not_reached"]:
            logger.warning("%-9s %s", "prune", line)

    def _model(self, step: Step) -> MoEModel:
        pruning = self.results.pruning(step)
        return self.models.dense() if pruning is None else self.models.pruned(pruning)

    def _final_model(self, step: Step) -> MoEModel:
        """As its checkpoint holds it, if it is pruned."""
        pruning = self.results.pruning(step)
        return self.models.dense() if pruning is None else self.models.final(pruning)

    def _material(self, step: Step) -> Material:
        """What a measurement may look at, as far as it needs it."""

        def dense_and_pruned() -> tuple[MoEModel, MoEModel]:
            pruning = self.results.pruning(step)
            assert pruning is not None, "asked for before there was a plan"
            return self.models.both(pruning)

        return Material(
            model=partial(self._final_model, step),
            dense_and_pruned=dense_and_pruned,
            statistics=partial(self.results.statistics, step),
            scores=partial(self.results.scores, step),
            plan=partial(self.results.plan, step),
            tokens=partial(self.results.tokens, step),
            unit=self.experiment.plugins.criterion.unit,
            widths=self.experiment.source.widths,
        )


def _tracked_run(experiment: Experiment, sweep: str | None, resolved: Mapping[str, Any]) -> Run:
    return Run(
        name=experiment.name,
        id=experiment.steps.key,
        job_type="experiment",
        group=sweep,
        tags=tuple(experiment.labels.values()),
        config={**resolved, "labels": experiment.labels},
    )
