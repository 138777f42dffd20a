"""Everything that can be known, and every mistake that can be found, before the first expensive step.

In: an experiment's configuration. Out: an `Experiment`: its plug-ins built, its model found, its text tokenised where it is
needed, its recipes written down.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from heapr.calibration.corpora import Corpus
from heapr.calibration.sampling import sample, windows
from heapr.errors import ConfigError
from heapr.evaluation.build import build_evaluators
from heapr.evaluation.evaluator import Evaluator
from heapr.model.load import ModelSource, find_model
from heapr.pruning.allocation import numbers_removed
from heapr.recipes import Recipes, experiment_recipes
from heapr.schema import CalibrationConfig, ExperimentConfig, build
from heapr.score.criterion import Criterion
from heapr.store import Store
from heapr.types import TokenWindows

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Experiment:
    """A checked experiment, ready to run.

    Attributes:
        name: readable: model, criterion, scope, ratio.
        source, device: the model, and where it will be.
        store, recipes: where results are, and what determines each.
        tokens: calibration tokens; none if the calibration is in the store already.
        batch_size: calibration sequences per pass.
        criterion: the score.
        ratio, scope: how much is removed, and what is ranked together.
        evaluators: in the order of their recipes.
    """

    name: str
    source: ModelSource
    device: torch.device
    store: Store
    recipes: Recipes
    tokens: TokenWindows | None
    batch_size: int
    criterion: Criterion
    ratio: float
    scope: str
    evaluators: Sequence[Evaluator]


def prepare(config: ExperimentConfig) -> Experiment:
    """Check and prepare an experiment.

    Args:
        config: checked by `heapr.schema.resolve`.

    Raises:
        ConfigError: the user's mistake.
    """
    corpus: Corpus = build(config.calibration.corpus, "calibration.corpus")
    criterion: Criterion = build(config.score, "score")
    evaluators = build_evaluators(config.evaluation)
    device = _device(config.runtime.device)
    if config.runtime.num_threads is not None:
        torch.set_num_threads(config.runtime.num_threads)
    store = Store(Path(config.paths.outputs) / "artifacts", device)
    source = find_model(config.model.path, dtype=config.model.dtype, revision=config.model.revision, digests=store.digests)
    _check_lengths(config, source)
    numbers_removed(source.layer_sizes, ratio=config.pruning.ratio, scope=config.pruning.scope)
    recipes = experiment_recipes(config, source.identity, corpus, evaluators)
    _warn_of_overlap(recipes)
    return Experiment(
        name=f"{config.model.name} {type(criterion).__name__} {config.pruning.scope} {config.pruning.ratio:.4g}",
        source=source,
        device=device,
        store=store,
        recipes=recipes,
        tokens=None if store.has(recipes.calibrate) else _calibration_tokens(corpus, source, config.calibration),
        batch_size=config.calibration.batch_size,
        criterion=criterion,
        ratio=config.pruning.ratio,
        scope=config.pruning.scope,
        evaluators=_prepared(evaluators, source, store, recipes),
    )


def _calibration_tokens(corpus: Corpus, source: ModelSource, settings: CalibrationConfig) -> TokenWindows:
    available = windows(corpus, source.tokenizer, length=settings.sequence_length)
    return sample(available, num_samples=settings.num_samples, seed=settings.seed, corpus_name=corpus.name)


def _prepared(evaluators: Sequence[Evaluator], source: ModelSource, store: Store, recipes: Recipes) -> Sequence[Evaluator]:
    """Every evaluator that has something left to do finds the user's mistakes now."""
    for evaluator, *wanted in zip(evaluators, recipes.evaluate_dense, recipes.evaluate_pruned, strict=True):
        if not all(store.has(recipe) for recipe in wanted):
            evaluator.prepare(source.tokenizer)
    return evaluators


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
    """No sequence may be longer than the model takes."""
    lengths = {"calibration.sequence_length": config.calibration.sequence_length}
    for name, entry in config.evaluation.items():
        if isinstance(entry, Mapping) and "window" in entry:
            lengths[f"evaluation.{name}.window"] = entry["window"]
    limit = source.max_sequence_length
    for name, length in lengths.items():
        if limit is not None and length > limit:
            raise ConfigError(f"{name}={length} is above the {limit} tokens of model '{config.model.name}'; give at most {limit}")


def _warn_of_overlap(recipes: Recipes) -> None:
    """Calibration and evaluation text are apart if they are other texts, or the train and held-out part of one."""
    calibrated = dict(recipes.calibrate.config["corpus"])
    split = calibrated.pop("split")
    for recipe in recipes.evaluate_dense:
        measured = dict(recipe.config["evaluator"].get("corpus", {}))
        if measured and {measured.pop("split"), split} != {"train", "heldout"} and measured == calibrated:
            logger.warning(
                "%s is measured on text that is calibrated on; choose another split for one of them, such as train and heldout",
                measured["corpus"],
            )
