"""A model that was pruned in memory, with what was done to it, and its checkpoint.

In: what `heapr.prune` made. Out: a Hugging Face folder, as a run writes it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from heapr import artifacts
from heapr.errors import ConfigError
from heapr.library.given import undisturbed
from heapr.model.checkpoint import save_checkpoint
from heapr.model.moe import MoEModel
from heapr.report.run.card import model_card
from heapr.types import Metrics, Plan, Statistics


@dataclass(frozen=True)
class Pruned:
    """A pruned model.

    Attributes:
        model: the model that was given, changed in place.
        plan: which of its atomic experts were kept: bool (E, F) by decoder layer index.
        metrics: of the "dense" and of the "pruned" model, the change of "size", and the "comparison"; numbers
            by name, as in a run's summary.json.
        statistics: of the dense model on the calibration tokens.
        about: what was done, in JSON types.
    """

    model: PreTrainedModel
    plan: Plan
    metrics: dict[str, Metrics]
    statistics: Statistics = field(repr=False)
    about: Mapping[str, Any] = field(repr=False)
    _tokenizer: PreTrainedTokenizerBase | None = field(repr=False)
    _dense_config: PretrainedConfig = field(repr=False)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a Hugging Face folder: weights, configuration, tokenizer, model card and plan.

        It is what a run writes, and loads in the same ways (docs/usage.md).

        Raises:
            ConfigError: the folder is not empty.
        """
        target = Path(folder).expanduser()
        if target.is_file() or (target.is_dir() and any(target.iterdir())):
            raise ConfigError(f"'{target}' is not an empty folder; give a new one")
        if target.is_dir():
            target.rmdir()
        with tempfile.TemporaryDirectory() as name, undisturbed(self.model):
            original = Path(name)
            self._describe_dense(original)
            save_checkpoint(MoEModel(self.model), original, target, about=self.about)
        card = model_card(self.about, self.metrics)
        artifacts.write_card_and_plan(target, card, self.plan)

    def _describe_dense(self, folder: Path) -> None:
        """Write the files that describe the model before pruning."""
        self._dense_config.save_pretrained(folder)
        if self.model.can_generate():
            self.model.generation_config.save_pretrained(folder)
        if self._tokenizer is not None:
            self._tokenizer.save_pretrained(folder)
