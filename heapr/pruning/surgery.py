"""Surgery: apply a plan to a model. Either really remove rows and columns, or set them to zero.

In: a dense or ragged model and a plan. Out: the same model, changed in place, one layer at a time.
Shape letters: D model width, E experts, F atomic experts of an expert, G rows of the input projection.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from heapr.model.moe import MoELayer, MoEModel
from heapr.model.ragged_experts import Matrices, RaggedExperts, layout_of, matrices_of
from heapr.types import Plan


@torch.no_grad()
def remove(model: MoEModel, plan: Plan) -> None:
    """Remove rows of W_gate and W_up, their biases, and columns of W_down (docs/method.md, 1): experts become ragged.

    Each layer's old experts are freed before the next one is cut.
    """
    for layer in model.layers:
        kept_EF = _kept(layer, plan)
        widths = kept_EF.sum(dim=1).tolist()
        layer.replace_experts(RaggedExperts(layer.experts, widths).fill(_cut(layer, kept_EF)))


@torch.no_grad()
def mask(model: MoEModel, plan: Plan) -> None:
    """Set the same rows, biases and columns to zero instead: the same function in the old shape."""
    for layer in model.layers:
        rows = layout_of(layer.experts).rows
        for kept_F, matrices in zip(_kept(layer, plan), matrices_of(layer.experts), strict=True):
            removed_F = ~kept_F[: matrices.down_DF.shape[1]].to(matrices.down_DF.device)
            matrices.down_DF[:, removed_F] = 0
            matrices.inputs_GD[rows(removed_F)] = 0
            if matrices.inputs_bias_G is not None:
                matrices.inputs_bias_G[rows(removed_F)] = 0


def _kept(layer: MoELayer, plan: Plan) -> Tensor:
    kept_EF = plan.layers[layer.index]
    assert kept_EF.shape == (layer.num_experts, layer.width), (layer.index, kept_EF.shape)
    return kept_EF


def _cut(layer: MoELayer, kept_EF: Tensor) -> Iterator[Matrices]:
    """What is left of each expert's weights."""
    rows = layout_of(layer.experts).rows
    for kept, matrices in zip(kept_EF, matrices_of(layer.experts), strict=True):
        kept_F = kept[: matrices.down_DF.shape[1]].to(matrices.down_DF.device)
        kept_G = rows(kept_F)
        bias_G = None if matrices.inputs_bias_G is None else matrices.inputs_bias_G[kept_G]
        yield Matrices(matrices.inputs_GD[kept_G], bias_G, matrices.down_DF[:, kept_F], matrices.down_bias_D)
