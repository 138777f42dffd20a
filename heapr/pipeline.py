"""The paper's algorithm, read aloud: calibrate -> score -> prune -> evaluate.

In: an experiment's configuration. Out: a `Summary`. Every stage goes through the artifact store, which answers from disk
when it already holds the result; nothing below this file sees a configuration or builds a path.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from heapr.calibration.collector import collect
from heapr.calibration.corpora import Corpus
from heapr.calibration.sampling import batches, sample, windows
from heapr.errors import ConfigError
from heapr.evaluation.build import build_evaluators
from heapr.evaluation.efficiency import size_change
from heapr.evaluation.evaluator import Evaluator
from heapr.files import write_json
from heapr.model.load import ModelSource, find_model
from heapr.model.moe import MoEModel
from heapr.progress import progress
from heapr.pruning.allocation import allocate
from heapr.pruning.surgery import remove
from heapr.recipes import Recipes, experiment_recipes
from heapr.schema import CalibrationConfig, ExperimentConfig, PruningConfig, build
from heapr.score.criterion import Criterion
from heapr.store import Artifact, Recipe, Store
from heapr.tracking.build import open_tracker
from heapr.tracking.tracker import Tracker
from heapr.types import ExpertWeights, Metrics, Plan, Scores, Statistics, TensorDict

logger = logging.getLogger(__name__)

TOKENS, STATISTICS, SCORES = "tokens.safetensors", "statistics.safetensors", "scores.safetensors"
PLAN, METRICS, SUMMARY = "plan.safetensors", "metrics.json", "summary.json"


@dataclass(frozen=True)
class Summary:
    """What a run did; `summary.json`.

    Attributes:
        metrics: by contract name, of the "dense" and the "pruned" model, and the change of "size".
        stages: one entry per artifact, in the order in which they were needed.
        config: the whole resolved configuration.
    """

    metrics: dict[str, Metrics]
    stages: list[dict[str, Any]]
    config: dict[str, Any]


def run(config: ExperimentConfig, folder: Path) -> Summary:
    """One experiment. Users' mistakes are found before the first expensive step.

    Args:
        config: checked by `heapr.schema.resolve`.
        folder: of this run; gets `summary.json` and the tracker's file.

    Raises:
        ConfigError: the user's mistake.
        FloatingPointError: calibration met NaN or infinity; the message names layer and batch.
    """
    corpus: Corpus = build(config.calibration.corpus, "calibration.corpus")
    criterion: Criterion = build(config.score, "score")
    evaluators = build_evaluators(config.evaluation)
    device = _device(config.runtime.device)
    if config.runtime.num_threads is not None:
        torch.set_num_threads(config.runtime.num_threads)
    source = find_model(config.model.path, dtype=config.model.dtype, revision=config.model.revision)
    _check_lengths(config, source)
    recipes = experiment_recipes(config, source.identity, corpus, evaluators)
    _warn_of_overlap(recipes)
    outputs = Path(config.paths.outputs)
    tracker = open_tracker(
        config.tracking.mode,
        project=config.tracking.project,
        run_folder=folder,
        wandb_folder=outputs,
        name=_name(config),
        config=asdict(config),
    )
    logger.info("%-9s %s, results in %s", "run", _name(config), folder)
    try:
        pipeline = Pipeline(Store(outputs / "artifacts"), ModelOnDemand(source, device), recipes, tracker)
        pipeline.prepare(evaluators)
        statistics = pipeline.calibrate(corpus, config.calibration)
        scores = pipeline.score(criterion, statistics)
        plan = pipeline.prune(scores, config.pruning)
        metrics = pipeline.evaluate(evaluators, statistics, plan)
        tracker.log({f"{group}/{name}": value for group, values in metrics.items() for name, value in values.items()})
    finally:
        tracker.close()
    summary = Summary(metrics=metrics, stages=pipeline.stages, config=asdict(config))
    write_json(folder / SUMMARY, asdict(summary))
    return summary


class Pipeline:
    """The four stages, each answered by the store or made.

    Args:
        store: where artifacts are.
        models: loads the model when a stage first needs it.
        recipes: what determines each result.
        tracker: gets seconds and cache hits of every stage.
    """

    def __init__(self, store: Store, models: ModelOnDemand, recipes: Recipes, tracker: Tracker) -> None:
        self.store, self.models, self.recipes, self.tracker = store, models, recipes, tracker
        self.stages: list[dict[str, Any]] = []

    def prepare(self, evaluators: Sequence[Evaluator]) -> None:
        """Let every evaluator that has something left to do find the user's mistakes now."""
        for evaluator in evaluators:
            recipes = (self.recipes.evaluate_dense[evaluator.name], self.recipes.evaluate_pruned[evaluator.name])
            if not all(self.store.has(recipe) for recipe in recipes):
                evaluator.prepare(self.models.source.tokenizer())

    def calibrate(self, corpus: Corpus, settings: CalibrationConfig) -> Statistics:
        """One forward and one backward pass over the calibration tokens; running sums per atomic expert."""

        def make(folder: Path) -> None:
            available = windows(corpus, self.models.source.tokenizer(), length=settings.sequence_length)
            tokens = sample(available, num_samples=settings.num_samples, seed=settings.seed, corpus_name=corpus.name)
            num_batches = math.ceil(settings.num_samples / settings.batch_size)
            model = self.models.dense()
            bar = progress(batches(tokens, settings.batch_size), total=num_batches, description="calibrate")
            _save(tokens.to_tensors(), folder / TOKENS)
            _save(collect(model, bar).to_tensors(), folder / STATISTICS)

        what = f"{settings.num_samples} x {settings.sequence_length} tokens of {corpus.name}"
        statistics = Statistics.from_tensors(load_file(self._get(self.recipes.calibrate, make, what).path / STATISTICS))
        _log_unrouted(statistics)
        return statistics

    def score(self, criterion: Criterion, statistics: Statistics) -> Scores:
        """The importance of every atomic expert."""

        def make(folder: Path) -> None:
            _save(criterion(statistics, self.models.weights()).to_tensors(), folder / SCORES)

        what = f"by {type(criterion).__name__}"
        return Scores.from_tensors(load_file(self._get(self.recipes.score, make, what).path / SCORES))

    def prune(self, scores: Scores, settings: PruningConfig) -> Plan:
        """Which atomic experts go: the lowest-scoring share."""

        def make(folder: Path) -> None:
            _save(allocate(scores, ratio=settings.ratio, scope=settings.scope).to_tensors(), folder / PLAN)

        what = f"{settings.ratio:.4g} of all atomic experts, ranked per {settings.scope}"
        plan = Plan.from_tensors(load_file(self._get(self.recipes.prune, make, what).path / PLAN))
        asked = settings.ratio * plan.num_atomic_experts
        logger.info("%-9s removes %d of %d atomic experts (asked for %.6g)", "prune", plan.num_removed, plan.num_atomic_experts, asked)
        return plan

    def evaluate(self, evaluators: Sequence[Evaluator], statistics: Statistics, plan: Plan) -> dict[str, Metrics]:
        """Metrics of the dense and of the pruned model. The dense ones come first: pruning changes the model in place."""
        dense = self._measure(evaluators, self.recipes.evaluate_dense, statistics, self.models.dense, "dense")
        pruned = self._measure(evaluators, self.recipes.evaluate_pruned, statistics, lambda: self.models.pruned(plan), "pruned")
        removed = {"atomic_experts_removed_ratio": plan.num_removed / plan.num_atomic_experts}
        return {"dense": dense, "pruned": pruned, "size": removed | size_change(dense, pruned)}

    def _measure(
        self,
        evaluators: Sequence[Evaluator],
        recipes: Mapping[str, Recipe],
        statistics: Statistics,
        model: Callable[[], MoEModel],
        variant: str,
    ) -> Metrics:
        metrics: Metrics = {}
        for evaluator in evaluators:

            def make(folder: Path, evaluator: Evaluator = evaluator) -> None:
                write_json(folder / METRICS, evaluator(model(), statistics))

            artifact = self._get(recipes[evaluator.name], make, f"{evaluator.name}, {variant}")
            metrics |= json.loads((artifact.path / METRICS).read_text())
        return metrics

    def _get(self, recipe: Recipe, make: Callable[[Path], None], what: str) -> Artifact:
        """Answer from the store or make it; one log line either way."""
        artifact = self.store.get(recipe, make)
        self.stages.append({"stage": recipe.stage, "what": what, **artifact.summary()})
        origin = "cached" if artifact.cached else f"made, peak memory {artifact.peak_memory_bytes / 2**30:.2f} GiB"
        logger.info("%-9s %s %s: %s, %.1f s", recipe.stage, recipe.key, what, origin, artifact.seconds)
        self.tracker.log({f"stages/{len(self.stages)}_{recipe.stage}/{name}": value for name, value in artifact.summary().items()})
        return artifact


class ModelOnDemand:
    """Loads the model when it is first needed: a run that finds everything in the store never does."""

    def __init__(self, source: ModelSource, device: torch.device) -> None:
        self.source, self.device = source, device
        self._dense: MoEModel | None = None
        self._pruned: MoEModel | None = None

    def dense(self) -> MoEModel:
        if self._dense is None:
            self._dense = self.source.load(self.device)
        return self._dense

    def pruned(self, plan: Plan) -> MoEModel:
        """The dense model with the plan applied; in place, so there is no dense model afterwards."""
        if self._pruned is None:
            self._pruned, self._dense = self.dense(), None
            remove(self._pruned, plan)
        return self._pruned

    def weights(self) -> Mapping[int, ExpertWeights]:
        """Expert weights by layer index; the model is loaded when the first is asked for."""
        return _LazyWeights(self)


class _LazyWeights(Mapping[int, ExpertWeights]):
    def __init__(self, models: ModelOnDemand) -> None:
        self._models = models

    def __getitem__(self, index: int) -> ExpertWeights:
        return next(layer.weights() for layer in self._models.dense().layers if layer.index == index)

    def __iter__(self) -> Iterator[int]:
        return (layer.index for layer in self._models.dense().layers)

    def __len__(self) -> int:
        return len(self._models.dense().layers)


def _save(tensors: TensorDict, path: Path) -> None:
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"runtime.device='{name}' is unknown; choose auto, cpu, cuda or cuda:<number>") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"runtime.device='{name}', but torch sees {torch.cuda.device_count()} GPUs; choose auto or cpu")
    return device


def _check_lengths(config: ExperimentConfig, source: ModelSource) -> None:
    limit = source.max_sequence_length
    if limit is not None and config.calibration.sequence_length > limit:
        raise ConfigError(
            f"calibration.sequence_length={config.calibration.sequence_length} is above the {limit} tokens of model "
            f"'{config.model.name}'; give at most {limit}"
        )
    for name, entry in config.evaluation.items():
        window = entry.get("window") if isinstance(entry, Mapping) else None
        if window is not None and not 2 <= window <= (limit or window):
            raise ConfigError(f"evaluation.{name}.window={window} is not between 2 and the {limit} tokens of model '{config.model.name}'")


def _warn_of_overlap(recipes: Recipes) -> None:
    calibrated_on = recipes.calibrate.config["corpus"]
    for name, recipe in recipes.evaluate_dense.items():
        if recipe.config["evaluator"].get("corpus") == calibrated_on:
            logger.warning("%s is measured on the very text that is calibrated on; use other splits to measure generalisation", name)


def _log_unrouted(statistics: Statistics) -> None:
    for index, layer in statistics.layers.items():
        if unrouted := int((layer.count_E == 0).sum()):
            logger.info(
                "%-9s no token reached %d of %d experts of layer %d; they go first", "calibrate", unrouted, len(layer.count_E), index
            )


def _name(config: ExperimentConfig) -> str:
    """Readable name of a run: model, criterion, scope, ratio."""
    criterion = config.score.get("_target_", "").rpartition(".")[2].lower()
    return f"{config.model.name} {criterion} {config.pruning.scope} {config.pruning.ratio:.4g}"
