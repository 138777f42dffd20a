"""The paper's algorithm, read aloud: calibrate -> score -> prune -> evaluate.

In: an experiment's configuration. Out: a `Summary`. Every stage goes through the artifact store, which answers from disk
when it already holds the result.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from heapr.calibration.collector import collect
from heapr.calibration.coverage import report_coverage
from heapr.calibration.sampling import batches
from heapr.evaluation.efficiency import size_change
from heapr.evaluation.evaluator import Material, measure
from heapr.evaluation.perplexity import WINDOW_LOSSES, perplexity_increases
from heapr.evaluation.routing import layer_routing
from heapr.evaluation.zero_shot import average_accuracy
from heapr.experiment import CARD, CHECKPOINT, Experiment, prepare
from heapr.files import write_json
from heapr.in_memory import ModelInMemory
from heapr.model.checkpoint import save_checkpoint
from heapr.model.moe import MoEModel
from heapr.progress import progress
from heapr.pruning.allocation import allocate
from heapr.pruning.allocation_report import report_allocation
from heapr.pruning.budget import Costs, costs_of
from heapr.pruning.load import PLAN, REPAIRED, read_plan, read_pruning
from heapr.pruning.repair import report_repair
from heapr.recipes import CHECKPOINT_PART, REPAIR_PART, Round
from heapr.report.card import model_card
from heapr.report.protocol import protocol_differences
from heapr.schema import ExperimentConfig
from heapr.store import WHOLE, Artifact, Recipe
from heapr.tensors_file import save_tensors
from heapr.tracking.build import open_tracker
from heapr.tracking.tracker import NUM_TOKENS, RATIO, Image, Run, Tracker
from heapr.tracking.values import CalibrationProgress, artifacts, figures, layer_table
from heapr.types import Evaluation, ExpertWeights, Metrics, Plan, ProtocolRecord, Pruning, Scores, Statistics, TokenWindows

logger = logging.getLogger(__name__)

# The files of the artifact contract.
TOKENS, STATISTICS, SCORES = "tokens.safetensors", "statistics.safetensors", "scores.safetensors"
ALLOCATION, REPAIR = "allocation.json", "repair.json"  # beside the plan, heapr/pruning/load.py
METRICS, DETAILS, SUMMARY = "metrics.json", "details.json", "summary.json"


@dataclass(frozen=True)
class Summary:
    """What a run did; `summary.json`.

    Attributes:
        metrics: by contract name, of the "dense" and the "pruned" model, the change of "size", and the "comparison" of both.
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
    logger.info("%-9s %s, results in %s", "run", experiment.name, folder)
    resolved = asdict(config)
    tracked = _tracked_run(experiment, sweep, resolved)
    with open_tracker(config.tracking, tracked, folder=folder, outputs=Path(config.paths.outputs)) as tracker:
        pipeline = Pipeline(experiment, tracker)
        statistics = pipeline.calibrate()
        scores = pipeline.score(statistics)
        dense = pipeline.evaluate_dense(statistics, scores)  # now, because pruning changes the model in place
        tracker.log({RATIO: 0.0, **dense["dense"]})
        pruning = pipeline.prune(statistics, scores)
        pruned = pipeline.evaluate_pruned(statistics, scores, pruning)
        metrics = pipeline.conclude(dense, pruned, pruning.plan)
        pipeline.show(statistics, pruning.plan, figures(sorted(folder.glob("*.png"))))
        tracker.log({RATIO: config.pruning.ratio, **metrics["pruned"], **metrics["size"], **metrics["comparison"]})
    for difference in protocol_differences(pipeline.protocols):
        logger.warning("dense and pruned cannot be compared: %s", difference)
    summary = Summary(metrics=metrics, protocols=pipeline.protocols, stages=pipeline.stages, config=resolved)
    write_json(folder / SUMMARY, asdict(summary))
    return summary


class Pipeline:
    """The four stages, each answered by the store or made.

    The model is loaded when a stage first needs it: a run that finds everything in the store never does.

    Args:
        experiment: what to do.
        tracker: gets seconds and cache hits of every stage, and what happens on the way.
    """

    def __init__(self, experiment: Experiment, tracker: Tracker) -> None:
        self.experiment, self.tracker = experiment, tracker
        self.stages: list[dict[str, Any]] = []
        self.protocols: dict[str, dict[str, ProtocolRecord]] = {"dense": {}, "pruned": {}}
        self.window_losses: dict[str, dict[str, list[float]]] = {"dense": {}, "pruned": {}}
        self.model = ModelInMemory(experiment)

    def calibrate(self) -> Statistics:
        """One forward and one backward pass over the calibration tokens; running sums per atomic expert."""
        return self._calibrate(self.experiment.recipes.rounds[0], self.model.dense)

    def score(self, statistics: Statistics) -> Scores:
        """The importance of every atomic expert."""
        return self._score(self.experiment.recipes.rounds[0], statistics, self.model.dense)

    def evaluate_dense(self, statistics: Statistics, scores: Scores) -> dict[str, Metrics]:
        """Metrics of the dense model, and of the comparisons that need no other."""
        recipes = self.experiment.recipes.evaluate_dense
        dense = self._measure(recipes, statistics, self.model.dense, variant="dense")
        return {"dense": dense, "comparison": self._compare("score", self._material(statistics, scores, None))}

    def prune(self, statistics: Statistics, scores: Scores) -> Pruning:
        """Which atomic experts go: the lowest-scoring share. In further rounds, of what is left by its own statistics."""
        experiment = self.experiment
        costs = costs_of(experiment.budget.unit, statistics, experiment.source.atomic_expert_parameters)
        first, *others = experiment.recipes.rounds
        pruning = self._prune(first, scores, costs, None)
        for later in others:
            model = partial(self.model.pruned, pruning)
            pruning = self._prune(later, self._score(later, self._calibrate(later, model), model), costs, pruning)
        return pruning

    def evaluate_pruned(self, statistics: Statistics, scores: Scores, pruning: Pruning) -> dict[str, Metrics]:
        """Metrics of the pruned model, and of the comparisons with the dense one, for which that is loaded once more."""
        recipes = self.experiment.recipes.evaluate_pruned
        pruned = self._measure(recipes, statistics, partial(self.model.final, pruning), variant="pruned")
        return {"pruned": pruned, "comparison": self._compare("prune", self._material(statistics, scores, pruning))}

    def _calibrate(self, round_: Round, model: Callable[[], MoEModel]) -> Statistics:
        def make(folder: Path) -> None:
            tokens, batch_size = self._tokens(), self.experiment.batch_size
            num_batches = math.ceil(len(tokens.ids_NW) / batch_size)
            bar = progress(batches(tokens, batch_size), total=num_batches, description="calibrate")
            statistics = collect(model(), bar, on_batch=CalibrationProgress(self.tracker))
            save_tensors(folder / TOKENS, tokens.to_tensors())
            save_tensors(folder / STATISTICS, statistics.to_tensors())

        artifact = self._get(round_.calibrate, make, round_.what)
        statistics = Statistics.from_tensors(load_file(artifact.path / STATISTICS))
        loss = statistics.loss_sum / statistics.num_predicted_tokens
        self.tracker.log({NUM_TOKENS: statistics.num_tokens, "calibration/loss": loss})
        if round_ is self.experiment.recipes.rounds[0]:
            report_coverage(statistics, self.experiment.source.widths)
        return statistics

    def _score(self, round_: Round, statistics: Statistics, model: Callable[[], MoEModel]) -> Scores:
        def weights(index: int) -> ExpertWeights:
            return next(layer.weights() for layer in model().layers if layer.index == index)

        def make(folder: Path) -> None:
            save_tensors(folder / SCORES, self.experiment.criterion(statistics, weights).to_tensors())

        artifact = self._get(round_.score, make, round_.what)
        return Scores.from_tensors(load_file(artifact.path / SCORES))

    def _prune(self, round_: Round, scores: Scores, costs: Costs | None, earlier: Pruning | None) -> Pruning:
        """The plan, the repair of what is kept, and, in the last round, the model as a checkpoint; each is kept once it is made."""
        experiment = self.experiment
        planned = self._get(round_.prune, partial(self._make_plan, round_, scores, costs, earlier), round_.what)
        self._tell(planned.path / ALLOCATION)
        if experiment.repair:
            repair = partial(self._make_repair, read_plan(planned.path), earlier)
            self._get(round_.prune, repair, f"{round_.what} repair".strip(), part=REPAIR_PART)
            self._tell(planned.path / REPAIR)
        pruning = read_pruning(planned.path, is_repaired=experiment.repair is not None)
        if experiment.save_checkpoint and round_ is experiment.recipes.rounds[-1]:
            self._get(round_.prune, partial(self._make_checkpoint, pruning, planned.path), "checkpoint", part=CHECKPOINT_PART)
        return pruning

    def _make_plan(self, round_: Round, scores: Scores, costs: Costs | None, earlier: Pruning | None, folder: Path) -> None:
        experiment = self.experiment
        original = experiment.source.widths
        widths = earlier.plan.widths if earlier else original
        budget = experiment.budget.of_round(round_.ratio, widths, original, costs)
        plan = allocate(scores, widths, budget, costs)
        write_json(folder / ALLOCATION, report_allocation(plan, scores, widths, budget, costs))
        whole = earlier.plan.then(plan) if earlier else plan
        about_plan = {"model": json.dumps(experiment.source.identity)} | ({"repaired": REPAIRED} if experiment.repair else {})
        save_tensors(folder / PLAN, whole.to_tensors(), about_plan)

    def _make_repair(self, plan: Plan, earlier: Pruning | None, folder: Path) -> None:
        batch_size = self.experiment.batch_size
        pruning, found = self.model.repaired(plan, earlier, lambda: list(batches(self._tokens(), batch_size)))
        save_tensors(folder / REPAIRED, pruning.repaired_tensors())
        write_json(folder / REPAIR, report_repair(found))

    def _make_checkpoint(self, pruning: Pruning, planned: Path, folder: Path) -> None:
        experiment = self.experiment
        model = self.model.masked(pruning) if experiment.form == "masked" else self.model.final(pruning)
        save_checkpoint(model, experiment.source.folder, folder / CHECKPOINT, about=experiment.about)
        (folder / CHECKPOINT / CARD).write_text(model_card(experiment.about, {}), encoding="utf-8")
        shutil.copy(planned / PLAN, folder / CHECKPOINT)

    def _tell(self, report: Path) -> None:
        """Log what a report says in words."""
        found = json.loads(report.read_text())
        for line in found["summary"]:
            logger.info("%-9s %s", "prune", line)
        for line in found["not_reached"]:
            logger.warning("%-9s %s", "prune", line)

    def conclude(self, dense: dict[str, Metrics], pruned: dict[str, Metrics], plan: Plan) -> dict[str, Metrics]:
        """All metrics; the card of the checkpoint tells them too."""
        experiment = self.experiment
        increases = perplexity_increases(self.window_losses["dense"], self.window_losses["pruned"])
        removed = {"atomic_experts_removed_ratio": 1 - plan.num_kept / experiment.source.num_atomic_experts}
        metrics = {
            "dense": dense["dense"],
            "pruned": pruned["pruned"],
            "size": removed | size_change(dense["dense"], pruned["pruned"]),
            "comparison": increases | dense["comparison"] | pruned["comparison"],
        }
        if experiment.save_checkpoint:
            card = partial(model_card, experiment.about, metrics)
            experiment.store.rewrite(experiment.recipes.prune, CHECKPOINT_PART, f"{CHECKPOINT}/{CARD}", card)
        return metrics

    def show(self, statistics: Statistics, plan: Plan, images: Mapping[str, Image]) -> None:
        """Layers, figures and artifacts, for whoever looks at the run."""
        widths = self.experiment.source.widths
        layers = [layer_routing(index, plan, width_E, statistics) for index, width_E in widths.items()]
        self.tracker.log({"layers": layer_table(layers), **images, **artifacts(self.stages)})

    def _measure(self, recipes: Sequence[Recipe], statistics: Statistics, model: Callable[[], MoEModel], *, variant: str) -> Metrics:
        metrics: Metrics = {}
        for evaluator, recipe in zip(self.experiment.evaluators, recipes, strict=True):
            what = f"{evaluator.name} {variant}"
            path = self._evaluate(recipe, lambda evaluator=evaluator: measure(evaluator, model(), statistics), what)  # type: ignore[misc]
            metrics |= json.loads((path / METRICS).read_text())
            if (path / DETAILS).is_file():
                details = json.loads((path / DETAILS).read_text())
                self.protocols[variant] |= details.get("protocols", {})
                self.window_losses[variant] |= details.get(WINDOW_LOSSES, {})
        return metrics | average_accuracy([evaluator.name for evaluator in self.experiment.evaluators], metrics)

    def _compare(self, upstream: str, material: Material) -> Metrics:
        """Metrics of the comparisons that look at nothing behind one stage."""
        metrics: Metrics = {}
        for comparison, recipe in zip(self.experiment.comparisons, self.experiment.recipes.compare, strict=True):
            if comparison.upstream == upstream:
                path = self._evaluate(recipe, partial(comparison, material), comparison.name)
                metrics |= json.loads((path / METRICS).read_text())
        return metrics

    def _evaluate(self, recipe: Recipe, evaluate: Callable[[], Evaluation], what: str) -> Path:
        """Folder of an evaluation's artifact."""

        def make(folder: Path) -> None:
            evaluation = evaluate()
            write_json(folder / METRICS, evaluation.metrics)
            if evaluation.details:
                write_json(folder / DETAILS, evaluation.details)

        return self._get(recipe, make, what).path

    def _material(self, statistics: Statistics, scores: Scores, pruning: Pruning | None) -> Material:
        def dense_and_pruned() -> tuple[MoEModel, MoEModel]:
            assert pruning is not None, "asked for before there was a plan"
            return self.model.dense_and_pruned(pruning)

        return Material(
            statistics=statistics,
            scores=scores,
            unit=self.experiment.criterion.unit,
            widths=self.experiment.source.widths,
            plan=pruning.plan if pruning else None,
            tokens=self._tokens,
            dense=self.model.dense,
            dense_and_pruned=dense_and_pruned,
        )

    def _tokens(self) -> TokenWindows:
        """Of the calibration."""
        experiment = self.experiment
        if experiment.tokens is not None:
            return experiment.tokens
        return TokenWindows.from_tensors(load_file(experiment.store.path(experiment.recipes.calibrate) / TOKENS))

    def _get(self, recipe: Recipe, make: Callable[[Path], None], what: str = "", part: str = WHOLE) -> Artifact:
        """Answer from the store or make it; one log line either way."""
        artifact = self.experiment.store.get(recipe, make, part)
        self.stages.append({"stage": recipe.stage, "what": what, **artifact.summary()})
        origin = "cached" if artifact.cached else f"made, peak memory {artifact.peak_memory_bytes / 2**30:.2f} GiB"
        logger.info("%-9s %s%s: %s, %.1f s", recipe.stage, f"{what} " if what else "", recipe.key, origin, artifact.seconds)
        measured = {"seconds": artifact.seconds, "cached": artifact.cached, "peak_memory_bytes": artifact.peak_memory_bytes}
        name = "/".join(["stages", recipe.stage, *what.split()])
        self.tracker.log({f"{name}/{number}": value for number, value in measured.items()})
        return artifact


def _tracked_run(experiment: Experiment, sweep: str | None, resolved: Mapping[str, Any]) -> Run:
    return Run(
        name=experiment.name,
        id=experiment.recipes.key,
        job_type="experiment",
        group=sweep,
        tags=tuple(experiment.labels.values()),
        config={**resolved, "labels": dict(experiment.labels)},
    )
