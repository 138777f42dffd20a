"""Surgery: apply a plan to a model. Either really remove rows and columns, or set them to zero.

In: a dense or ragged model, and what pruning is to make of it. Out: the same model, changed in place, one layer at a time.
Shape letters: D model width, E experts, F atomic experts of an expert, G rows of the input projection.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from heapr.model.experts.layout import Matrices, layout_of, matrices_of
from heapr.model.experts.ragged import RaggedExperts
from heapr.model.layerwise import walk_layers
from heapr.model.moe import MoELayer, MoEModel
from heapr.progress import progress
from heapr.pruning.repair import LayerRepair, Repair
from heapr.types import Plan, RepairedWeights


@torch.no_grad()
def remove(model: MoEModel, plan: Plan, repaired: RepairedWeights | None = None) -> None:
    """Remove rows of W_gate and W_up, their biases, and columns of W_down (docs/method.md, 1): experts become ragged.

    Each layer's old experts are freed before the next one is cut.

    Args:
        model: dense or ragged.
        plan: for this model.
        repaired: weights of what is left that repair changed; none leaves all as they are.
    """
    for layer in model.layers:
        layer.replace_experts(_cut(layer, plan, repaired))


@torch.no_grad()
def remove_and_repair(model: MoEModel, plan: Plan, repair: Repair, batches: Sequence[Tensor]) -> dict[int, LayerRepair]:
    """Remove and repair one layer after the other (docs/method.md, 18 to 23); what was found for each, by decoder layer index.
    Layers that lose nothing stay as they are.

    Args:
        model: dense or ragged.
        plan: for this model.
        repair: how.
        batches: int64 (N, W) token ids each, of the calibration.

    Raises:
        ConfigError: the repair follows the residual stream, and the model does not pass `check_stream`.
        FloatingPointError: NaN or infinity; the message names the layer.
    """
    found: dict[int, LayerRepair] = {}
    cut_from_dense: list[tuple[MoELayer, RaggedExperts]] = []
    follow = repair.follows_stream
    walk = progress(walk_layers(model, batches, follow_stream=follow), total=len(model.layers), description="repair", unit="layer")
    for layer, inputs, target in walk:
        after = _cut(layer, plan, None)
        if after.widths == tuple(layer.widths):
            found[layer.index] = LayerRepair(error_before=0.0, error_after=0.0, num_repaired=0)
        else:
            found[layer.index] = repair(layer.experts, after, inputs, target=target)
        if repair.is_sequential:
            layer.replace_experts(after)
        else:
            cut_from_dense.append((layer, after))
        del inputs, target  # before those of the next layer are made
    for layer, after in cut_from_dense:
        layer.replace_experts(after)
    return found


@torch.no_grad()
def mask(model: MoEModel, plan: Plan, repaired: RepairedWeights | None = None) -> None:
    """Set the same rows, biases and columns to zero instead: the same function in the old shape. Arguments as for `remove`."""
    for layer in model.layers:
        rows, kept_EF = layout_of(layer.experts).rows, _kept(layer, plan)
        left = matrices_of(_cut(layer, plan, repaired))
        for kept, matrices, kept_matrices in zip(kept_EF, matrices_of(layer.experts), left, strict=True):
            kept_F = kept[: matrices.down_DF.shape[1]].to(matrices.down_DF.device)
            kept_G = rows(kept_F)
            matrices.down_DF[:, kept_F], matrices.inputs_GD[kept_G] = kept_matrices.down_DF, kept_matrices.inputs_GD
            matrices.down_DF[:, ~kept_F], matrices.inputs_GD[~kept_G] = 0, 0
            if matrices.inputs_bias_G is not None:
                matrices.inputs_bias_G[~kept_G] = 0


def _cut(layer: MoELayer, plan: Plan, repaired: RepairedWeights | None) -> RaggedExperts:
    """What is left of a layer's experts."""
    kept_EF = _kept(layer, plan)
    experts = RaggedExperts(layer.experts, kept_EF.sum(dim=1).tolist()).fill(_kept_matrices(layer, kept_EF))
    for name, tensor in ({} if repaired is None else repaired[layer.index]).items():
        experts.get_parameter(name).copy_(tensor)
    return experts


def _kept(layer: MoELayer, plan: Plan) -> Tensor:
    kept_EF = plan.layers[layer.index]
    assert kept_EF.shape == (layer.num_experts, layer.width), (layer.index, kept_EF.shape)
    return kept_EF


def _kept_matrices(layer: MoELayer, kept_EF: Tensor) -> Iterator[Matrices]:
    """What is left of each expert's weights."""
    rows = layout_of(layer.experts).rows
    for kept, matrices in zip(kept_EF, matrices_of(layer.experts), strict=True):
        kept_F = kept[: matrices.down_DF.shape[1]].to(matrices.down_DF.device)
        kept_G = rows(kept_F)
        bias_G = None if matrices.inputs_bias_G is None else matrices.inputs_bias_G[kept_G]
        yield Matrices(matrices.inputs_GD[kept_G], bias_G, matrices.down_DF[:, kept_F], matrices.down_bias_D)
