"""What determines each stage's result: the recipes of an experiment, known before anything is computed.

In: an experiment's configuration and what its model, corpora and evaluators are. Out: one `Recipe` per artifact. What
does not change a result (batch sizes, device, paths, tracking) does not appear here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from heapr.calibration.corpora import Corpus
from heapr.evaluation.evaluator import Evaluator
from heapr.schema import ExperimentConfig
from heapr.store import Recipe

# Raised when the code of a stage gives other results than before: older artifacts are then made again.
STAGE_VERSIONS = {"calibrate": 1, "score": 1, "prune": 1, "evaluate": 2}


@dataclass(frozen=True)
class Recipes:
    """The recipes of one experiment.

    Attributes:
        calibrate, score, prune: one each.
        evaluate_dense, evaluate_pruned: one per evaluator, in their order.
    """

    calibrate: Recipe
    score: Recipe
    prune: Recipe
    evaluate_dense: Sequence[Recipe]
    evaluate_pruned: Sequence[Recipe]


def experiment_recipes(
    config: ExperimentConfig, model_identity: Mapping[str, str], corpus: Corpus, evaluators: Sequence[Evaluator]
) -> Recipes:
    """The recipes of an experiment; each holds the keys of those that it is made from."""
    settings = config.calibration
    calibrate = _recipe(
        "calibrate",
        {
            "model": dict(model_identity),
            "corpus": corpus.identity(),
            "num_samples": settings.num_samples,
            "sequence_length": settings.sequence_length,
            "seed": settings.seed,
        },
    )
    score = _recipe("score", {"criterion": dict(config.score)}, calibrate)
    prune = _recipe("prune", {"ratio": config.pruning.ratio, "scope": config.pruning.scope}, score)
    return Recipes(
        calibrate=calibrate,
        score=score,
        prune=prune,
        evaluate_dense=[_evaluate_dense(evaluator, model_identity, calibrate) for evaluator in evaluators],
        evaluate_pruned=[_recipe("evaluate", {"evaluator": evaluator.identity()}, prune) for evaluator in evaluators],
    )


def _evaluate_dense(evaluator: Evaluator, model_identity: Mapping[str, str], calibrate: Recipe) -> Recipe:
    """Depends on the calibration only if the evaluator reads its statistics, so that most are made once per model."""
    config = {"evaluator": evaluator.identity(), "model": dict(model_identity)}
    return _recipe("evaluate", config, *([calibrate] if evaluator.uses_statistics else []))


def _recipe(stage: str, config: Mapping[str, Any], *upstream: Recipe) -> Recipe:
    keys = {recipe.stage: recipe.key for recipe in upstream}
    return Recipe(stage=stage, version=STAGE_VERSIONS[stage], config=config, upstream=keys)
