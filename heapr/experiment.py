"""What a configuration means: plug-ins built, the model found, every mistake found that can be found before
the first expensive step.

In: an experiment's configuration. Out: an `Experiment`, for a run, a dry run or a sweep. Nothing is loaded or
made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from heapr.artifacts import ARTIFACTS
from heapr.errors import ConfigError, NotHereError
from heapr.evaluation.build import build_measurements
from heapr.evaluation.measurement import Measurement
from heapr.measure import machine
from heapr.model.checkpoint import check_form
from heapr.model.device import find_device
from heapr.model.load import ModelSource, find_model
from heapr.model.moe import MoEModel
from heapr.plugins import build
from heapr.pruning.budget import Budget, the_width
from heapr.pruning.layer_repair import Repair
from heapr.pruning.uniform import Settings, choose_uniform_width, describe_uniform_width, uniform_settings
from heapr.schema import ExperimentConfig, ModelConfig
from heapr.score.criterion import Criterion
from heapr.steps import Steps, experiment_steps
from heapr.store import Store
from heapr.text.corpora import Corpus
from heapr.text.mixture import Mixture
from heapr.types import Granularity
from heapr.words import option_name

T = TypeVar("T")


@dataclass(frozen=True)
class Plugins:
    """What the configuration names by `_target_`.

    Attributes:
        text: calibrated on; None if it is not on this machine and that was forgiven.
        criterion: the score.
        repair: how what is left makes up for what is removed; None leaves it as it is.
        measurements: of the evaluation, in the order of the configuration.
    """

    text: Corpus | Mixture | None
    criterion: Criterion
    repair: Repair | None
    measurements: Sequence[Measurement]


@dataclass(frozen=True)
class Experiment:
    """A checked experiment.

    Attributes:
        config: what is asked.
        plugins: what that names.
        source, device: the model, and where it will be.
        budget: how much is removed of it.
        store: where results are.
        steps: what is made, in its order; none if the text is not on this machine.
    """

    config: ExperimentConfig
    plugins: Plugins
    source: ModelSource
    device: torch.device
    budget: Budget
    store: Store
    steps: Steps

    @property
    def name(self) -> str:
        """Readable: model, criterion, scope, ratio and of what, and what goes beyond the paper."""
        pruning = self.config.pruning
        words = [
            self.config.model.name,
            option_name(self.config.score["_target_"]),
            pruning.scope,
            f"{100 * pruning.ratio:.4g}%",
        ]
        words += [] if pruning.budget == "atomic_experts" else [f"of {pruning.budget}"]
        words += [option_name(pruning.repair["_target_"])] if pruning.repair else []
        words += [f"{pruning.rounds} rounds"] if pruning.rounds > 1 else []
        return " ".join(words)

    @property
    def labels(self) -> dict[str, str]:
        """What it is one of: model, criterion, scope, calibration corpus."""
        assert self.plugins.text is not None
        return {
            "model": self.config.model.name,
            "criterion": option_name(self.config.score["_target_"]),
            "scope": self.config.pruning.scope,
            "corpus": self.plugins.text.name,
        }

    @property
    def uniform_settings(self) -> Settings:
        """What the uniform form changes in the model's configuration; nothing for the other forms.

        Raises:
            ConfigError: the configuration cannot say it.
        """
        return (
            {}
            if self.budget.uniform_width is None
            else uniform_settings(self.source.config, self.budget.uniform_width)
        )

    @property
    def notes_on_budget(self) -> list[str]:
        """What is made of the ratio, as far as that is known before there are scores, a line each."""
        width = self.budget.uniform_width
        return [] if width is None else [describe_uniform_width(self.source.widths, self.budget.ratio, width)]

    @property
    def about(self) -> dict[str, Any]:
        """What is done to the model, in JSON types: for the checkpoint's config.json and card."""
        calibrate, score, prune = (
            self.steps.first("calibrate"),
            self.steps.first("score"),
            self.steps.last("prune"),
        )
        return {
            "model": self.config.model.name,
            "pruned_from": self.source.identity,
            "criterion": dict(score.origin.config["criterion"]),
            "calibration": {
                name: value for name, value in calibrate.origin.config.items() if name != "model"
            },
            **prune.origin.config,
            **self._about_width(),
            "rounds": self.config.pruning.rounds,
            **self.source.left_behind,
            "keys": {step.origin.stage: step.origin.key for step in (calibrate, score, prune)},
        }

    def _about_width(self) -> dict[str, Any]:
        """The uniform width, and the ratio that it comes to."""
        width = self.budget.uniform_width
        return (
            {}
            if width is None
            else {"width": width, "ratio_reached": 1 - width / the_width(self.source.widths)}
        )

    def load_dense(self) -> MoEModel:
        """The dense model.

        Raises:
            ConfigError: it cannot be loaded.
        """
        return self.source.load(self.device, self.config.runtime.device_map)


def prepare(config: ExperimentConfig, notes: list[str] | None = None) -> Experiment:
    """Check an experiment; what takes the model's tokenizer or weights comes later (heapr/ready.py).

    Args:
        config: checked by `heapr.schema.resolve`.
        notes: gets a line for each thing that is not on this machine, which then is left out, and of a hub
            model the configuration alone is asked for: so a dry run wants it. None refuses what is not here.

    Raises:
        ConfigError: the user's mistake.
    """
    device = _or_note(notes, lambda: find_device(config.runtime.device)) or torch.device("cpu")
    plugins = build_plugins(config, notes)
    store = Store(Path(config.paths.outputs) / ARTIFACTS, device)
    source = find_source(config.model, digests=store.digests, config_only=notes is not None)
    _check_lengths(config, source)
    budget = _find_budget(config, source, plugins.criterion)
    if config.pruning.save_checkpoint:
        check_form(source.config, config.pruning.form)
    steps = Steps()
    if plugins.text is not None:
        here = _machine(config, device)
        steps = experiment_steps(
            config, plugins.text, plugins.measurements, model=source.identity, machine=here
        )
    experiment = Experiment(config, plugins, source, device, budget, store, steps)
    _ = experiment.uniform_settings  # its mistakes
    return experiment


def build_plugins(config: ExperimentConfig, notes: list[str] | None = None) -> Plugins:
    """Build what a configuration names.

    Args:
        config: checked by `heapr.schema.resolve`.
        notes: as in `prepare`.

    Raises:
        ConfigError: something cannot be built, or does not go with the rest.
    """
    text = _or_note(
        notes, lambda: _build_text(config.calibration.corpus, "calibration.corpus", is_read=notes is not None)
    )
    criterion = _build_criterion(config)
    repair: Repair | None = (
        None if config.pruning.repair is None else build(config.pruning.repair, "pruning.repair")
    )
    evaluation = config.evaluation if notes is None else _what_is_here(config.evaluation, notes)
    return Plugins(text, criterion, repair, build_measurements(evaluation))


def find_source(model: ModelConfig, *, digests: Path | None = None, config_only: bool = False) -> ModelSource:
    """The model that is pruned.

    Raises:
        ConfigError: see `find_model`.
    """
    return find_model(
        model.path,
        dtype=model.dtype,
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
        digests=digests,
        config_only=config_only,
    )


def _machine(config: ExperimentConfig, device: torch.device) -> dict[str, Any]:
    """What timings depend on, with the threads that the run will have."""
    here = machine(device)
    return here if config.runtime.num_threads is None else here | {"threads": config.runtime.num_threads}


def _build_criterion(config: ExperimentConfig) -> Criterion:
    criterion: Criterion = build(config.score, "score")
    if criterion.granularity is Granularity.EXPERT and config.pruning.scope == "expert":
        raise ConfigError(
            f"pruning.scope=expert ranks inside each expert, but score {type(criterion).__name__} removes"
            " whole experts; use pruning=global or pruning=layer"
        )
    return criterion


def _build_text(entry: Mapping[str, Any], where: str, *, is_read: bool) -> Corpus | Mixture:
    """A corpus or mixture; one that is read says at once if it is not here."""
    text: Corpus | Mixture = build(entry, where)
    if is_read:
        text.identity()
    return text


def _what_is_here(evaluation: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """The evaluation without the corpora whose text is missing."""
    here = {}
    for name, entry in evaluation.get("corpora", {}).items():
        where = f"evaluation.corpora.{name}"
        if _or_note(notes, lambda entry=entry, where=where: _build_text(entry, where, is_read=True)):  # type: ignore[misc]
            here[name] = entry
    return {**evaluation, "corpora": here}


def _or_note(notes: list[str] | None, find: Callable[[], T]) -> T | None:
    """What is found; None and a note if it is not on this machine, where notes are taken."""
    try:
        return find()
    except NotHereError as error:
        if notes is None:
            raise
        notes.append(str(error))
        return None


def _find_budget(config: ExperimentConfig, source: ModelSource, criterion: Criterion) -> Budget:
    """How much of the model is removed, and in which pieces.

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
        protected_layers=tuple(config.pruning.protected_layers),
    )
    if config.pruning.form == "uniform":
        width = choose_uniform_width(source.config, source.widths, budget, source.dtype)
        budget = replace(budget, uniform_width=width)
    budget.check(source.widths)
    return budget


def _check_lengths(config: ExperimentConfig, source: ModelSource) -> None:
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
            raise ConfigError(
                f"{name}={length} is above the {limit} tokens of model '{config.model.name}'; give at most"
                f" {limit}"
            )
