"""An experiment that has been checked: its configuration, plug-ins, model, budget, store and steps.

In: what heapr/prepare.py found. Out: names, notes and descriptions that follow from it, and the dense model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from transformers import PretrainedConfig

from heapr.evaluation.measurement import Measurement
from heapr.model.config_file import prediction_heads
from heapr.model.heads import KEPT, LEFT_OUT, describe_heads, why_left_out
from heapr.model.load import ModelSource
from heapr.model.moe import MoEModel
from heapr.placement import Placement
from heapr.pruning.budget import Budget
from heapr.pruning.fewer_experts import describe_num_experts, fewer_experts_settings
from heapr.pruning.layer_repair import Repair
from heapr.pruning.uniform import Settings, describe_uniform_width, uniform_settings
from heapr.ranks import ONE_PROCESS, Ranks
from heapr.schema import ExperimentConfig
from heapr.score.criterion import Criterion
from heapr.steps import Steps
from heapr.store import Store
from heapr.text.corpora import Corpus
from heapr.text.mixture import Mixture
from heapr.words import option_name

T = TypeVar("T")


@dataclass(frozen=True)
class Plugins:
    """The objects that the configuration names by `_target_`.

    Attributes:
        text: the calibration text; None if a dry run did not find it on this machine.
        criterion: computes the scores.
        repair: refits the kept weights; None leaves them unchanged.
        measurements: in the order of the configuration.
    """

    text: Corpus | Mixture | None
    criterion: Criterion
    repair: Repair | None
    measurements: Sequence[Measurement]


@dataclass(frozen=True)
class Experiment:
    """A checked experiment.

    Attributes:
        config: its configuration.
        plugins: the objects that the configuration names.
        source, device: the model, and where it will be placed.
        budget: how much of it is removed.
        store: holds the results.
        steps: what is made, in order; empty if a dry run did not find the text on this machine.
        placement: where weights and activations will be.
        left_out: measurements that mean nothing where the model is streamed.
        ranks: the processes that share the work.
    """

    config: ExperimentConfig
    plugins: Plugins
    source: ModelSource
    device: torch.device
    budget: Budget
    store: Store
    steps: Steps
    placement: Placement
    left_out: Sequence[str] = ()
    ranks: Ranks = ONE_PROCESS

    @property
    def name(self) -> str:
        """A readable name: model, criterion, scope and ratio, then budget, repair and rounds if unusual."""
        pruning = self.config.pruning
        words = [
            self.config.model.name,
            option_name(self.config.score["_target_"]),
            pruning.scope,
            f"{100 * pruning.ratio:.4g}%",
        ]
        if pruning.budget != "atomic_experts":
            words.append(f"of {pruning.budget}")
        if pruning.repair:
            words.append(option_name(pruning.repair["_target_"]))
        if pruning.rounds > 1:
            words.append(f"{pruning.rounds} rounds")
        return " ".join(words)

    @property
    def labels(self) -> dict[str, str]:
        """What trackers group runs by: model, criterion, scope, calibration corpus."""
        assert self.plugins.text is not None
        return {
            "model": self.config.model.name,
            "criterion": option_name(self.config.score["_target_"]),
            "scope": self.config.pruning.scope,
            "corpus": self.plugins.text.name,
        }

    @property
    def stock_settings(self) -> Settings:
        """What a form in the family's own class changes in the model's configuration; else empty.

        Raises:
            ConfigError: the model's configuration has no field for it.
        """
        return stock_settings(self.budget, self.source.config)

    @property
    def notes_on_budget(self) -> list[str]:
        """Lines on how the ratio is rounded, as far as it is known before there are scores."""
        budget, widths = self.budget, self.source.widths
        if budget.num_experts is not None:
            return [describe_num_experts(widths, budget.ratio, budget.num_experts)]
        width = budget.uniform_width
        return [] if width is None else [describe_uniform_width(widths, budget.ratio, width)]

    @property
    def heads_left_out(self) -> str | None:
        """Why the checkpoint lacks the heads that predict further tokens; None if it has them, or there are
        none."""
        is_quantised = self.source.quantization is not None
        return why_left_out(self.source.heads, self.config.pruning.form, is_quantised=is_quantised)

    @property
    def notes_on_heads(self) -> list[str]:
        """What becomes of the heads that predict further tokens; empty if there are none or nothing is saved.

        Needs the weight files.
        """
        heads = self.source.heads
        if not heads or not self.config.pruning.save_checkpoint:
            return []
        return [describe_heads(heads, self.heads_left_out)]

    @property
    def about(self) -> dict[str, Any]:
        """What is done to the model, in JSON types, for the checkpoint's config.json and card."""
        calibrate = self.steps.first("calibrate").origin
        score = self.steps.first("score").origin
        prune = self.steps.last("prune").origin
        calibration = {name: value for name, value in calibrate.config.items() if name != "model"}
        width = {} if self.budget.uniform_width is None else {"width": self.budget.uniform_width}
        heads = {}
        if prediction_heads(self.source.config):
            is_kept = bool(self.source.heads) and self.heads_left_out is None
            heads[KEPT if is_kept else LEFT_OUT] = prediction_heads(self.source.config)
        return {
            "model": self.config.model.name,
            "pruned_from": self.source.identity,
            "criterion": dict(score.config["criterion"]),
            "calibration": calibration,
            **prune.config,
            **width,
            "rounds": self.config.pruning.rounds,
            **self.source.left_behind,
            **heads,
            "keys": {origin.stage: origin.key for origin in (calibrate, score, prune)},
        }

    def load_dense(self) -> MoEModel:
        """Load the dense model.

        Raises:
            ConfigError: it cannot be loaded.
        """
        return self.placement.load(
            self.source, self.device, self.store.root, device_map=self.config.runtime.device_map
        )


def stock_settings(budget: Budget, config: PretrainedConfig) -> Settings:
    """What a form in the family's own class changes in a dense model's configuration; else empty.

    Raises:
        ConfigError: the configuration has no field for it.
    """
    if budget.uniform_width is not None:
        return uniform_settings(config, budget.uniform_width)
    if budget.num_experts is not None:
        return fewer_experts_settings(config, budget.num_experts)
    return {}
