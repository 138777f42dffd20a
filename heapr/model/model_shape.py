"""What must be known of a model to plan its pruning: configuration, dtype, widths. No weights.

In: a transformers model, which may be on the meta device. Out: a `ModelShape`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from heapr.errors import ConfigError
from heapr.model.moe import experts_per_token, find_moe_layers


@dataclass(frozen=True)
class ModelShape:
    """The shape of a model before pruning.

    Attributes:
        config: transformers' configuration.
        dtype: of the weights in memory.
        widths: atomic experts of every expert, by decoder layer index.
        atomic_expert_parameters: parameters removed with one atomic expert, by decoder layer index.
        experts_per_token: K.
    """

    config: PretrainedConfig
    dtype: torch.dtype
    widths: Mapping[int, Sequence[int]]
    atomic_expert_parameters: Mapping[int, int]
    experts_per_token: int

    @property
    def num_atomic_experts(self) -> int:
        return sum(sum(width_E) for width_E in self.widths.values())

    @property
    def max_sequence_length(self) -> int | None:
        """The longest sequence in tokens; None if the configuration sets no limit."""
        return getattr(self.config.get_text_config(), "max_position_embeddings", None)


def shape_of(model: PreTrainedModel) -> dict[str, Any]:
    """The fields of `ModelShape` that follow from the model itself, by name.

    Raises:
        ConfigError: it has no MoE layer, or needs a missing capability, which the message names.
    """
    layers = find_moe_layers(model)
    return {
        "widths": {layer.index: layer.widths for layer in layers},
        "atomic_expert_parameters": {layer.index: layer.atomic_expert_parameters for layer in layers},
        "experts_per_token": experts_per_token(model),
    }


def check_sizes(
    config: PretrainedConfig, widths: Collection[Sequence[int]], num_routed: int, folder: Path
) -> None:
    """Check that a model of these sizes can read a token and send it to experts.

    Args:
        config: of the model.
        widths: atomic experts of every expert, for each layer.
        num_routed: to so many experts a token is sent.
        folder: with config.json, for the message.

    Raises:
        ConfigError: it cannot.
    """
    text = config.get_text_config()
    fewest = min(len(width_E) for width_E in widths)
    narrowest = min(min(width_E, default=-1) for width_E in widths)
    # Pruning may leave an expert of width 0, but no such layer.
    smallest = min(sum(width_E) for width_E in widths)
    problem = ""
    if fewest < 1 or smallest < 1 or narrowest < 0:
        problem = "has a layer without experts, or without atomic experts"
    elif not 1 <= num_routed <= fewest:
        problem = f"sends every token to {num_routed} of {fewest} experts"
    elif text.vocab_size < 1 or text.hidden_size < 1:
        problem = f"has a vocabulary of {text.vocab_size} tokens and a width of {text.hidden_size}"
    elif getattr(text, "max_position_embeddings", None) == 0:
        problem = f"accepts {text.max_position_embeddings} tokens"
    if problem:
        raise ConfigError(f"config.json in '{folder}' {problem}; correct it, or get it again")
