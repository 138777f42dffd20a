"""Everything that can be known, and every mistake that can be found, before the first expensive step.

In: an experiment's configuration. Out: an `Experiment`: its plug-ins built, its model found, its text tokenised where it is
needed, its recipes written down.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from heapr.calibration.corpora import Corpus, share_text
from heapr.calibration.mixture import Mixture, identities_of_parts
from heapr.calibration.sampling import draw
from heapr.errors import ConfigError
from heapr.evaluation.build import build_evaluators
from heapr.evaluation.evaluator import Comparison, Evaluator
from heapr.model.checkpoint import check_form
from heapr.model.device import find_device
from heapr.model.load import ModelSource, find_model
from heapr.pruning.budget import Budget, Guards, the_width
from heapr.pruning.repair import Repair
from heapr.pruning.uniform import Settings, choose_uniform_width, describe_uniform_width, uniform_settings
from heapr.recipes import CHECKPOINT_PART, REPAIR_PART, Recipes, experiment_recipes
from heapr.schema import CalibrationConfig, ExperimentConfig, build
from heapr.score.criterion import Criterion
from heapr.store import Store
from heapr.types import Granularity, TokenWindows

logger = logging.getLogger(__name__)

CHECKPOINT, CARD = "checkpoint", "README.md"  # folder of the prune artifact, and the file written last in it


@dataclass(frozen=True)
class Experiment:
    """A checked experiment, ready to run.

    Attributes:
        name: readable: model, criterion, scope, ratio.
        labels: what it is one of: model, criterion, scope, calibration corpus.
        source, device: the model, and where it will be.
        store, recipes: where results are, and what determines each.
        tokens: calibration tokens; none if the calibration is in the store already.
        batch_size: calibration sequences per pass.
        criterion: the score.
        budget: how much is removed.
        repair: how what is left makes up for it; none leaves it as it is.
        form: of the checkpoint: ragged, uniform or masked.
        uniform_settings: what the uniform form changes in the model's configuration.
        save_checkpoint: whether the pruned model is written.
        about: what is done, for its config.json and card.
        device_map: how weights are spread over several GPUs.
        evaluators, comparisons: in the order of their recipes.
    """

    name: str
    labels: Mapping[str, str]
    source: ModelSource
    device: torch.device
    store: Store
    recipes: Recipes
    tokens: TokenWindows | None
    batch_size: int
    criterion: Criterion
    budget: Budget
    repair: Repair | None
    form: str
    uniform_settings: Settings
    save_checkpoint: bool
    about: Mapping[str, Any]
    device_map: str | None
    evaluators: Sequence[Evaluator]
    comparisons: Sequence[Comparison]


def prepare(config: ExperimentConfig) -> Experiment:
    """Check and prepare an experiment.

    Args:
        config: checked by `heapr.schema.resolve`.

    Raises:
        ConfigError: the user's mistake.
    """
    text: Corpus | Mixture = build(config.calibration.corpus, "calibration.corpus")
    criterion, repair = find_criterion(config), find_repair(config)
    device = find_device(config.runtime.device)
    if config.runtime.num_threads is not None:
        torch.set_num_threads(config.runtime.num_threads)
    built = build_evaluators(config.evaluation, device)
    evaluators = [entry for entry in built if isinstance(entry, Evaluator)]
    comparisons = [entry for entry in built if isinstance(entry, Comparison)]
    store = Store(Path(config.paths.outputs) / "artifacts", device)
    source = find_source(config, store)
    if source.has_weights:  # else they are fetched when the model is loaded, and looked at then
        _ = source.left_out
    check_lengths(config, source)
    budget = find_budget(config, source, criterion)
    for note in notes_on_budget(source, budget):
        logger.info("%-9s %s", "prune", note)
    if config.pruning.save_checkpoint:
        check_form(source.config, config.pruning.form)
    recipes = experiment_recipes(config, source.identity, text, evaluators, comparisons)
    check_space(config, source, store, recipes)
    _warn_of_overlap(recipes)
    _prepare(evaluators, comparisons, source, store, recipes)
    return Experiment(
        name=name_of(config),
        labels={
            "model": config.model.name,
            "criterion": option_name(config.score["_target_"]),
            "scope": config.pruning.scope,
            "corpus": text.name,
        },
        source=source,
        device=device,
        store=store,
        recipes=recipes,
        tokens=None if store.has(recipes.calibrate) else _calibration_tokens(text, source, config.calibration),
        batch_size=config.calibration.batch_size,
        criterion=criterion,
        budget=budget,
        repair=repair,
        form=config.pruning.form,
        uniform_settings=find_uniform_settings(source, budget),
        save_checkpoint=config.pruning.save_checkpoint,
        about=_about(config, recipes, source, budget),
        device_map=config.runtime.device_map,
        evaluators=evaluators,
        comparisons=comparisons,
    )


def name_of(config: ExperimentConfig) -> str:
    """Readable: model, criterion, scope, ratio and of what, and what goes beyond the paper."""
    pruning = config.pruning
    words = [config.model.name, option_name(config.score["_target_"]), pruning.scope, f"{100 * pruning.ratio:.4g}%"]
    words += [] if pruning.budget == "atomic_experts" else [f"of {pruning.budget}"]
    words += [option_name(pruning.repair["_target_"])] if pruning.repair else []
    words += [f"{pruning.rounds} rounds"] if pruning.rounds > 1 else []
    return " ".join(words)


def find_criterion(config: ExperimentConfig) -> Criterion:
    """The score.

    Raises:
        ConfigError: it cannot be built, or does not go with the scope.
    """
    criterion: Criterion = build(config.score, "score")
    if criterion.granularity is Granularity.EXPERT and config.pruning.scope == "expert":
        raise ConfigError(
            f"pruning.scope=expert ranks inside each expert, but score {type(criterion).__name__} removes whole experts; "
            "use pruning=global or pruning=layer"
        )
    return criterion


def find_repair(config: ExperimentConfig) -> Repair | None:
    """How what is left makes up for what is removed.

    Raises:
        ConfigError: it cannot be built.
    """
    if config.pruning.repair is None:
        return None
    repair: Repair = build(config.pruning.repair, "pruning.repair")
    return repair


def find_source(config: ExperimentConfig, store: Store) -> ModelSource:
    """The model that is pruned.

    Raises:
        ConfigError: see `find_model`.
    """
    model = config.model
    return find_model(
        model.path,
        dtype=model.dtype,
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
        digests=store.digests,
        config_only=config.dry_run,
    )


def find_budget(config: ExperimentConfig, source: ModelSource, criterion: Criterion) -> Budget:
    """How much of it is removed, and in which pieces.

    Raises:
        ConfigError: more than it can lose.
    """
    budget = Budget(
        ratio=config.pruning.ratio,
        scope=config.pruning.scope,
        experts_per_token=source.experts_per_token,
        width_multiple=config.pruning.width_multiple or 1,
        granularity=criterion.granularity,
        unit=config.pruning.budget,
        guards=Guards(
            min_expert_ratio=config.pruning.min_expert_ratio,
            min_layer_ratio=config.pruning.min_layer_ratio,
            protected_layers=tuple(config.pruning.protected_layers),
            tempering=config.pruning.tempering,
        ),
    )
    if config.pruning.form == "uniform":
        width = choose_uniform_width(source.config, source.widths, budget, source.dtype)
        budget = replace(budget, uniform_width=width)
    budget.check(source.widths)
    return budget


def find_uniform_settings(source: ModelSource, budget: Budget) -> Settings:
    """What the uniform form changes in the model's configuration; nothing for the other forms.

    Raises:
        ConfigError: the configuration cannot say it.
    """
    return {} if budget.uniform_width is None else uniform_settings(source.config, budget.uniform_width)


def notes_on_budget(source: ModelSource, budget: Budget) -> list[str]:
    """What is made of the ratio, as far as that is known before there are scores, a line each."""
    return [] if budget.uniform_width is None else [describe_uniform_width(source.widths, budget.ratio, budget.uniform_width)]


def check_space(config: ExperimentConfig, source: ModelSource, store: Store, recipes: Recipes) -> None:
    """The disk has room for what is still to be made of repaired weights (at least the columns of W_down) and of the checkpoint.

    Raises:
        ConfigError: it has not.
    """
    routed = sum(sum(width_E) * source.atomic_expert_parameters[index] for index, width_E in source.widths.items())
    num_parameters = 0
    for round_ in recipes.rounds:
        missing = [part for part in recipes.parts_of(round_, config.pruning) if not store.has(round_.prune, part)]
        kept = round((1 - round_.ratio) * routed)
        if REPAIR_PART in missing:
            num_parameters += kept // 3
        if CHECKPOINT_PART in missing:
            total = sum(parameter.numel() for parameter in source.on_meta().model.parameters())
            num_parameters += total if config.pruning.form == "masked" else total - routed + kept
    instead = "leave the checkpoint out with pruning.save_checkpoint=false"
    store.check_space(num_parameters * source.dtype.itemsize, "the pruned weights", instead)


def option_name(target: str) -> str:
    """The name of a plug-in's option, from its `_target_`: heapr.score.gradient.HeaprSum is heapr_sum."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", target.rpartition(".")[2]).lower()


def _about(config: ExperimentConfig, recipes: Recipes, source: ModelSource, budget: Budget) -> dict[str, Any]:
    """What is done to the model, in JSON types."""
    return {
        "model": config.model.name,
        "pruned_from": source.identity,
        "criterion": dict(recipes.score.config["criterion"]),
        "calibration": {name: value for name, value in recipes.calibrate.config.items() if name != "model"},
        **recipes.prune.config,
        **_about_width(source, budget),
        "rounds": config.pruning.rounds,
        **source.left_behind,
        "keys": {recipe.stage: recipe.key for recipe in (recipes.calibrate, recipes.score, recipes.prune)},
    }


def _about_width(source: ModelSource, budget: Budget) -> dict[str, Any]:
    """The uniform width, and the ratio that it comes to."""
    if budget.uniform_width is None:
        return {}
    return {"width": budget.uniform_width, "ratio_reached": 1 - budget.uniform_width / the_width(source.widths)}


def _calibration_tokens(text: Corpus | Mixture, source: ModelSource, settings: CalibrationConfig) -> TokenWindows:
    return draw(
        text,
        source.tokenizer,
        length=settings.sequence_length,
        num_samples=settings.num_samples,
        seed=settings.seed,
        max_characters=settings.max_characters,
    )


def _prepare(
    evaluators: Sequence[Evaluator], comparisons: Sequence[Comparison], source: ModelSource, store: Store, recipes: Recipes
) -> None:
    """Every evaluator that has something left to do finds the user's mistakes now."""
    for evaluator, *wanted in zip(evaluators, recipes.evaluate_dense, recipes.evaluate_pruned, strict=True):
        if not all(store.has(recipe) for recipe in wanted):
            evaluator.prepare(source.tokenizer)
    for comparison, recipe in zip(comparisons, recipes.compare, strict=True):
        if not store.has(recipe):
            comparison.prepare(source)


def check_lengths(config: ExperimentConfig, source: ModelSource) -> None:
    """No sequence may be longer than the model takes.

    Raises:
        ConfigError: one is.
    """
    lengths = {"calibration.sequence_length": config.calibration.sequence_length}
    for name, entry in config.evaluation.items():
        if isinstance(entry, Mapping) and "window" in entry:
            lengths[f"evaluation.{name}.window"] = entry["window"]
    limit = source.max_sequence_length
    for name, length in lengths.items():
        if limit is not None and length > limit:
            raise ConfigError(f"{name}={length} is above the {limit} tokens of model '{config.model.name}'; give at most {limit}")


def _warn_of_overlap(recipes: Recipes) -> None:
    """Calibration and evaluation text are apart if they are other texts, or parts of one that have no document in common."""
    calibrated = [corpus for corpus, _ in identities_of_parts(recipes.calibrate.config["corpus"])]
    measured = [recipe.config["evaluator"].get("corpus") for recipe in [*recipes.evaluate_dense, *recipes.compare]]
    shared = [corpus["corpus"] for corpus in measured if corpus and any(share_text(part, corpus) for part in calibrated)]
    for name in dict.fromkeys(shared):
        logger.warning(
            "%s is measured on text that is calibrated on; choose another split for one of them, such as train and heldout", name
        )
