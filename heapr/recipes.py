"""What determines each stage's result: the recipes of an experiment, known before anything is computed.

In: an experiment's configuration and what its model, corpora and evaluators are. Out: one `Recipe` per artifact. What
does not change a result (batch sizes, device, paths, tracking) does not appear here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from heapr.calibration.corpora import Corpus
from heapr.calibration.mixture import Mixture
from heapr.evaluation.evaluator import Comparison, Evaluator
from heapr.schema import ExperimentConfig, PruningConfig
from heapr.store import KEY_LENGTH, Recipe

# Raised when the code of a stage gives other results than before: older artifacts are then made again.
STAGE_VERSIONS = {"calibrate": 2, "score": 1, "prune": 3, "evaluate": 3}

# What is made from the plan and kept with it (heapr/store.py): the repaired weights, and the model in the last round
REPAIR_PART, CHECKPOINT_PART = "repair", "checkpoint"

# Fields of `PruningConfig`: those that were in the first keys, and those that change no plan.
ALWAYS_IN_KEY, WITHOUT_INFLUENCE = ("ratio", "scope", "width_multiple", "form"), ("save_checkpoint", "rounds")


@dataclass(frozen=True)
class Round:
    """One round of pruning; the statistics of all but the first are those of the model that the round before left.

    Attributes:
        what: its name in logs; nothing for the first.
        ratio: share of the dense model's atomic experts that is gone after it.
        calibrate, score, prune: one each.
    """

    what: str
    ratio: float
    calibrate: Recipe
    score: Recipe
    prune: Recipe


@dataclass(frozen=True)
class Recipes:
    """The recipes of one experiment.

    Attributes:
        rounds: at least one.
        evaluate_dense, evaluate_pruned: one per evaluator, in their order.
        compare: one per comparison, in their order.
    """

    rounds: Sequence[Round]
    evaluate_dense: Sequence[Recipe]
    evaluate_pruned: Sequence[Recipe]
    compare: Sequence[Recipe]

    @property
    def calibrate(self) -> Recipe:
        """Of the dense model."""
        return self.rounds[0].calibrate

    @property
    def score(self) -> Recipe:
        """Of the dense model."""
        return self.rounds[0].score

    @property
    def prune(self) -> Recipe:
        """Of the last round: the pruned model."""
        return self.rounds[-1].prune

    def parts_of(self, round_: Round, pruning: PruningConfig) -> list[str]:
        """Parts of a round's prune artifact that an experiment makes."""
        parts = [REPAIR_PART] if pruning.repair else []
        is_last = round_ is self.rounds[-1]
        return [*parts, CHECKPOINT_PART] if pruning.save_checkpoint and is_last else parts

    @property
    def key(self) -> str:
        """Of the whole experiment: the same whenever all results are, whatever the paths, device or tracking."""
        last = [self.prune, *self.evaluate_dense, *self.evaluate_pruned, *self.compare]
        return hashlib.sha256(" ".join(recipe.key for recipe in last).encode()).hexdigest()[:KEY_LENGTH]


def experiment_recipes(
    config: ExperimentConfig,
    model_identity: Mapping[str, str],
    text: Corpus | Mixture,
    evaluators: Sequence[Evaluator],
    comparisons: Sequence[Comparison],
) -> Recipes:
    """The recipes of an experiment; each holds the keys of those that it is made from."""
    rounds = _rounds(config, model_identity, text)
    calibrate, score, prune = rounds[0].calibrate, rounds[0].score, rounds[-1].prune
    return Recipes(
        rounds=rounds,
        evaluate_dense=[_evaluate_dense(evaluator, model_identity, calibrate) for evaluator in evaluators],
        evaluate_pruned=[_recipe("evaluate", {"evaluator": evaluator.identity()}, prune) for evaluator in evaluators],
        compare=[_compare(comparison, {"score": score, "prune": prune}[comparison.upstream]) for comparison in comparisons],
    )


def _rounds(config: ExperimentConfig, model_identity: Mapping[str, str], text: Corpus | Mixture) -> list[Round]:
    """Every round removes the same number of atomic experts. A round's key does not tell how many follow, so that experiments which
    begin alike share their beginning."""
    settings, pruning = config.calibration, config.pruning
    tokens: dict[str, Any] = {
        "model": dict(model_identity),
        "corpus": text.identity(),
        "num_samples": settings.num_samples,
        "sequence_length": settings.sequence_length,
        "seed": settings.seed,
        "max_characters": settings.max_characters,
    }
    rounds: list[Round] = []
    for number in range(1, pruning.rounds + 1):
        ratio = pruning.ratio * number / pruning.rounds
        calibrate = _recipe("calibrate", tokens, *[earlier.prune for earlier in rounds[-1:]])
        score = _recipe("score", {"criterion": dict(config.score)}, calibrate)
        prune = _recipe("prune", _settings_of_plan(pruning) | {"ratio": ratio}, score)
        rounds.append(Round(f"round {number}" if number > 1 else "", ratio, calibrate, score, prune))
    return rounds


def _settings_of_plan(pruning: PruningConfig) -> dict[str, Any]:
    """What determines the plan. Options enter where they are not at their defaults, so that a new one changes no key."""
    default = PruningConfig()
    settings = {name: value for name, value in asdict(pruning).items() if name not in WITHOUT_INFLUENCE}
    return {name: value for name, value in settings.items() if name in ALWAYS_IN_KEY or value != getattr(default, name)}


def _evaluate_dense(evaluator: Evaluator, model_identity: Mapping[str, str], calibrate: Recipe) -> Recipe:
    """Depends on the calibration only if the evaluator reads its statistics, so that most are made once per model."""
    config = {"evaluator": evaluator.identity(), "model": dict(model_identity)}
    return _recipe("evaluate", config, *([calibrate] if evaluator.uses_statistics else []))


def _compare(comparison: Comparison, upstream: Recipe) -> Recipe:
    return _recipe("evaluate", {"evaluator": comparison.identity()}, upstream)


def _recipe(stage: str, config: Mapping[str, Any], *upstream: Recipe) -> Recipe:
    keys = {recipe.stage: recipe.key for recipe in upstream}
    return Recipe(stage=stage, version=STAGE_VERSIONS[stage], config=config, upstream=keys)
