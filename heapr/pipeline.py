"""The paper's algorithm, step by step: calibrate -> score -> prune -> evaluate.

In: a checked experiment. Out: artifacts, and what the evaluations found. heapr/steps.py lists the steps and
what each one needs; this file says how each is made. Every step goes through the artifact store, which
returns a result that it already has.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from torch import Tensor

from heapr import artifacts
from heapr.artifacts import CARD, CHECKPOINT, CHECKPOINT_PART, REPAIR_PART, Report
from heapr.calibration.checkpoints import Checkpoints
from heapr.calibration.collector import collect
from heapr.calibration.coverage import Coverage, coverage_of, report_coverage
from heapr.errors import ConfigError
from heapr.evaluation.measurement import Material, Need, measure
from heapr.evaluation.routing import layer_routing
from heapr.experiment import Experiment
from heapr.findings import Findings
from heapr.model.checkpoint import save_checkpoint
from heapr.model.moe import MoEModel
from heapr.model.shelf import Files
from heapr.progress import progress
from heapr.provider import ModelProvider
from heapr.pruning.layer_repair import report_repair
from heapr.pruning.super_experts import SuperExpert
from heapr.report.run.card import model_card
from heapr.report.run.widths import draw_widths
from heapr.stages import Planning, layer_weights, log_report, super_experts_of
from heapr.step_results import StepResults
from heapr.steps import Step
from heapr.store import Artifact
from heapr.text.windows import batches
from heapr.tracking import values
from heapr.tracking.tracker import FIGURES, NUM_TOKENS, Figure, Tracker, Value
from heapr.types import Evaluation, Metrics, Plan, Pruning, Scores, Statistics, TokenWindows

logger = logging.getLogger(__name__)

T = TypeVar("T")

GIB = 2**30  # bytes
WIDTHS = f"{FIGURES}widths"


class Pipeline:
    """Takes the steps of an experiment; the store returns a step's result or has it made.

    A step reads what it needs from the files of earlier steps. The model is loaded when a step first needs
    it, so a run that finds every result in the store never loads it.

    Args:
        experiment: what to do.
        tracker: receives the seconds and cache hits of every step, and its progress.
        tokens: the calibration tokens; None if the calibration is in the store.

    Attributes:
        findings: what the evaluations found.
        stages: one entry per artifact, for `summary.json`.
        coverage: how well the first calibration covers the experts; None before it is there.
        super_experts: the dense model's, known from the first plan on.
    """

    def __init__(self, experiment: Experiment, tracker: Tracker, tokens: TokenWindows | None) -> None:
        self.experiment, self.tracker = experiment, tracker
        self.stages: list[dict[str, Any]] = []
        self.coverage: Coverage | None = None
        self.super_experts: tuple[SuperExpert, ...] = ()
        names = [measurement.name for measurement in experiment.plugins.measurements]
        self.findings = Findings(names)
        self.models = ModelProvider(
            experiment.load_dense,
            repair=experiment.plugins.repair,
            ranks=experiment.ranks,
            form=experiment.config.pruning.form,
            stock_settings=experiment.stock_settings,
        )
        self.results = StepResults(experiment.store, experiment.steps, tokens)

    def take(self, steps: Sequence[Step]) -> None:
        """Take the steps in order."""
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
        """Collect running sums per atomic expert in one forward and one backward pass over the tokens."""

        def compute() -> tuple[TokenWindows, Statistics]:
            tokens = self.results.tokens(step)
            batch_size = self.experiment.config.calibration.batch_size
            ranks = self.experiment.ranks
            shared = ranks.share(batches(tokens, batch_size))
            on_batch = values.CalibrationProgress(self.tracker)
            model = self._model(step)
            files = partial(self._files, step, tokens)
            way = self.experiment.placement.way(model, files)
            checkpoints = None
            if not model.is_streamed:  # which records every layer
                checkpoints = Checkpoints(files(), self.experiment.config.runtime.checkpoint_seconds)
            shown: Iterable[Tensor] = shared
            if not model.is_streamed:  # which shows its progress through the layers
                shown = progress(shared, total=len(shared), description="calibrate")
            statistics = collect(
                model, shown, way=way, on_batch=on_batch, ranks=ranks, checkpoints=checkpoints
            )
            return tokens, statistics

        self._get(step, compute, artifacts.write_calibration)
        statistics: Statistics = self.results.of(step)
        loss = statistics.loss_sum / statistics.num_predicted_tokens
        self.tracker.log({NUM_TOKENS: statistics.num_tokens, "calibration/loss": loss})
        if step is self.experiment.steps.first("calibrate"):
            self.coverage = coverage_of(statistics, self.experiment.source.widths)
            report_coverage(self.coverage)
            self.tracker.log(self.coverage.metrics)

    def score(self, step: Step) -> None:
        """Give every atomic expert its importance."""

        def compute() -> Scores:
            weights = partial(layer_weights, partial(self._model, step))
            return self.experiment.plugins.criterion(self.results.statistics(step), weights)

        self._get(step, compute, artifacts.write_scores)

    def prune(self, step: Step) -> None:
        """Plan which atomic experts go: the share with the lowest scores.

        From the second round on, the choice is among what the round before kept.
        """
        source = self.experiment.source

        def compute() -> tuple[Plan, Report]:
            earlier = self.results.pruning(step)
            planning = Planning(
                source,
                self.experiment.budget,
                self.results.statistics(step),
                super_experts=self._super_experts(step),
                protects_super_experts=self.experiment.config.pruning.protect_super_experts,
            )
            scores = self.results.scores(step)
            ratio = step.origin.config["ratio"]
            return planning.plan(scores, ratio, earlier.plan if earlier else None)

        is_repaired = self.experiment.plugins.repair is not None
        write = partial(artifacts.write_plan, model=source.identity, is_repaired=is_repaired)
        artifact = self._get(step, compute, write)
        log_report(artifacts.read_allocation(artifact.path))
        if step is self.experiment.steps.first("prune"):
            self.super_experts = _read_super_experts(artifact.path)

    def _super_experts(self, step: Step) -> tuple[SuperExpert, ...]:
        """The dense model's super experts: found in the first round, read from its report later.

        Of a streamed model they are looked for only if they are to be protected: it reads all weights.
        """
        first = self.experiment.steps.first("prune")
        if step is not first:
            return _read_super_experts(self.results.folder(first))
        is_asked = self.experiment.config.pruning.protect_super_experts
        if self.experiment.placement.is_streamed and not is_asked:
            return ()
        return super_experts_of(self.models.dense(), self.results.statistics(step))

    def repair(self, step: Step) -> None:
        """Refit the kept weights so that they make up for what is removed."""

        def calibration_batches() -> list[Tensor]:
            return list(batches(self.results.tokens(step), self.experiment.config.calibration.batch_size))

        def compute() -> tuple[Pruning, Report]:
            plan, earlier = self.results.plan(step), self.results.pruning(step)
            files = self._files(step, self.results.tokens(step))
            pruning, found = self.models.repaired(plan, earlier, calibration_batches, files)
            return pruning, report_repair(found)

        write = partial(artifacts.write_repair, plan_folder=self.results.folder(step))
        artifact = self._get(step, compute, write)
        log_report(artifacts.read_repair(artifact.path))

    def write_checkpoint(self, step: Step) -> None:
        """Save the pruned model as a folder that transformers loads, with a model card and the plan."""
        experiment = self.experiment

        def write(folder: Path, model: MoEModel) -> None:
            checkpoint = folder / CHECKPOINT
            source = experiment.source
            heads = source.heads if experiment.heads_left_out is None else ()
            save_checkpoint(model, source.folder, checkpoint, about=self._about(), carried=heads)
            (checkpoint / CARD).write_text(model_card(self._about(), {}), encoding="utf-8")
            plans = checkpoint / artifacts.PLANS
            plans.mkdir()
            artifacts.copy_plan(self.results.folder(step), plans, code=checkpoint)

        self._get(step, lambda: self._final_model(step), write)

    def evaluate(self, step: Step) -> None:
        """Take one measurement of the dense model, of the pruned model, or of both compared."""

        def compute() -> Evaluation:
            assert step.measurement is not None
            is_timing = Need.MACHINE in step.measurement.needs
            if is_timing and not self.experiment.ranks.is_first:
                return Evaluation({})  # rank 0 measures while the others wait
            return measure(step.measurement, self._material(step))

        artifact = self._get(step, compute, artifacts.write_evaluation)
        self.findings.add(step.variant, artifacts.read_evaluation(artifact.path))

    def conclude(self, dense: Metrics) -> dict[str, Metrics]:
        """All metrics of the run; also writes them into the checkpoint's model card."""
        experiment = self.experiment
        metrics = self.findings.conclude(dense, self._kept_ratio())
        if experiment.config.pruning.save_checkpoint and experiment.ranks.is_first:
            card = partial(model_card, self._about(), metrics)
            checkpoint = experiment.steps.last(CHECKPOINT_PART)
            self._rewrite_card(checkpoint, card)
        return metrics

    @property
    def checkpoint(self) -> Path:
        """The folder of the checkpoint, where one is saved."""
        step = self.experiment.steps.last(CHECKPOINT_PART)
        return self.experiment.store.path(step.origin) / CHECKPOINT

    def _rewrite_card(self, checkpoint: Step, card: Callable[[str], str]) -> None:
        """Write the metrics into the model card; a run does not fail because of it."""
        name = f"{CHECKPOINT}/{CARD}"
        try:
            self.experiment.store.rewrite(checkpoint.origin, checkpoint.part, name, card)
        except ConfigError as error:
            logger.warning("%-9s the model card of the checkpoint lacks the metrics: %s", "prune", error)

    def _kept_ratio(self) -> float:
        plan: Plan = self.results.of(self.experiment.steps.last("prune"))
        return plan.num_kept / self.experiment.source.num_atomic_experts

    def _about(self) -> dict[str, Any]:
        """What is done to the model, for the checkpoint's config.json and card; with the ratio as rounded."""
        about = self.experiment.about
        if self.experiment.budget.unit == "atomic_experts":
            about["ratio_reached"] = 1 - self._kept_ratio()
        return about

    def log_layers_and_artifacts(self) -> None:
        """Send the tracker a table and a figure of the layers, the checkpoint's path, and the artifacts."""
        steps = self.experiment.steps
        statistics = self.results.of(steps.first("calibrate"))
        plan = self.results.of(steps.last("prune"))
        widths = self.experiment.source.widths
        layers = [layer_routing(index, plan, width_E, statistics) for index, width_E in widths.items()]
        draw = partial(draw_widths, layers, self.experiment.name)
        shown: dict[str, Value] = {
            "layers": values.layer_table(layers),
            WIDTHS: Figure(draw),
        }
        if self.experiment.config.pruning.save_checkpoint:
            shown[CHECKPOINT] = str(self.checkpoint.resolve())
        self.tracker.log(shown | values.artifacts(self.stages))

    def _get(self, step: Step, compute: Callable[[], T], write: Callable[[Path, T], None]) -> Artifact:
        """The step's artifact, from the store or newly made; one log line either way."""
        artifact = self.experiment.store.get(step.origin, compute, write, step.part)
        self.stages.append({"stage": artifact.stage, "what": step.what, **artifact.summary()})
        made = f"made, peak memory {artifact.peak_memory_bytes / GIB:.2f} GiB"
        how = "cached" if artifact.cached else made
        which = f"{step.what} {artifact.key}".strip()
        logger.info("%-9s %s: %s, %.1f s", artifact.stage, which, how, artifact.seconds)
        name = "/".join(["stages", artifact.stage, *step.what.split()])
        measured = {
            f"{name}/seconds": artifact.seconds,
            f"{name}/cached": artifact.cached,
            f"{name}/peak_memory_bytes": artifact.peak_memory_bytes,
        }
        self.tracker.log(measured)
        return artifact

    def _model(self, step: Step) -> MoEModel:
        """The model that a step works on: dense, or pruned so far."""
        pruning = self.results.pruning(step)
        return self.models.dense() if pruning is None else self.models.pruned(pruning)

    def _files(self, step: Step, tokens: TokenWindows) -> Files:
        """Files for what a step has computed so far, which another process can go on from."""
        batch_size = self.experiment.config.calibration.batch_size
        about = {
            "key": step.id,
            "tokens": tokens.sha256,
            "batch_size": batch_size,
            "device": self.experiment.device.type,
            "streamed": self.experiment.placement.is_streamed,
            "ranks": self.experiment.ranks.size,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        scratch = self.experiment.store.scratch(step.origin, step.part)
        return Files(scratch / "files", about)

    def _final_model(self, step: Step) -> MoEModel:
        """The model that a step works on; a pruned one in the form in which its checkpoint holds it."""
        pruning = self.results.pruning(step)
        return self.models.dense() if pruning is None else self.models.final(pruning)

    def _material(self, step: Step) -> Material:
        """Whatever a measurement may ask for, each loaded when it is asked for."""

        def dense_and_pruned() -> tuple[MoEModel, MoEModel]:
            pruning = self.results.pruning(step)
            assert pruning is not None, "asked for before there was a plan"
            return self.models.both(pruning)

        results = self.results
        return Material(
            model=partial(self._final_model, step),
            dense_and_pruned=dense_and_pruned,
            statistics=partial(results.statistics, step),
            scores=partial(results.scores, step),
            plan=partial(results.plan, step),
            tokens=partial(results.tokens, step),
            unit=self.experiment.plugins.criterion.unit,
            widths=self.experiment.source.widths,
            ranks=self.experiment.ranks,
        )


def _read_super_experts(folder: Path) -> tuple[SuperExpert, ...]:
    """The super experts in the report of a plan."""
    return tuple(SuperExpert(**each) for each in artifacts.read_super_experts(folder))
