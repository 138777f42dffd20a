"""What must be known of a model to plan its pruning: configuration, dtype, widths. No weights.

In: a transformers model, which may be on the meta device. Out: a `ModelShape`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

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
