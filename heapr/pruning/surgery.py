"""Surgery: apply a plan to a model. Either remove rows and columns, or set them to zero.

In: a dense or ragged model, a plan and perhaps repaired weights. Out: the same model, changed in place, layer
by layer.
Shape letters: D model width, E experts, F atomic experts of an expert, G rows of the input projection.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence
from functools import partial

import torch
from torch import Tensor

from heapr.model.experts.layout import Matrices, layout_of, matrices_of
from heapr.model.experts.ragged import RaggedExperts
from heapr.model.layerwise import walk_layers
from heapr.model.moe import MoELayer, MoEModel
from heapr.progress import progress
from heapr.pruning.layer_repair import LayerRepair, Repair
from heapr.types import Plan, RepairedWeights, TensorDict


@torch.no_grad()
def remove(model: MoEModel, plan: Plan, repaired: RepairedWeights | None = None) -> None:
    """Remove rows of W_gate and W_up, their biases, and columns of W_down (docs/method.md, 1): experts become
    ragged.

    Each layer's old experts are freed before the next one is cut.

    Args:
        model: dense or ragged.
        plan: for this model.
        repaired: the kept weights that repair changed. With None, all kept weights stay as they are.
    """
    for layer in model.layers:
        model.change(layer, partial(_replace, layer, plan, repaired))


def _replace(layer: MoELayer, plan: Plan, repaired: RepairedWeights | None) -> None:
    """A layer's experts by what is kept of them."""
    layer.replace_experts(_cut(layer, plan, repaired))


@torch.no_grad()
def remove_and_repair(
    model: MoEModel,
    plan: Plan,
    repair: Repair,
    batches: Sequence[Tensor],
    repaired: MutableMapping[int, TensorDict] | None = None,
) -> dict[int, LayerRepair]:
    """Remove and repair one layer after the other (docs/method.md, 18 to 23). Layers that lose nothing stay
    as they are.

    Args:
        model: dense or ragged.
        plan: for this model.
        repair: how.
        batches: int64 (N, W) token ids each, of the calibration.
        repaired: gets the weights that the repair may change, by decoder layer index and name.

    Returns:
        what was found for each layer, by decoder layer index.

    Raises:
        ConfigError: the repair follows the residual stream, and the model does not pass `check_stream`.
        FloatingPointError: NaN or infinity; the message names the layer.
    """
    found: dict[int, LayerRepair] = {}
    repaired = {} if repaired is None else repaired
    names = repaired_names(model, repair)
    walk = walk_layers(model, batches, follow_stream=repair.follows_stream)
    bar = progress(walk, total=len(model.layers), description="repair", unit="layer")
    for layer, inputs, target in bar:
        after = _cut(layer, plan, None)
        if after.widths == tuple(layer.widths):
            found[layer.index] = LayerRepair(error_before=0.0, error_after=0.0, num_repaired=0)
        else:
            found[layer.index] = repair(layer.experts, after, inputs, target=target)
        repaired[layer.index] = {name: after.get_parameter(name).detach() for name in names}
        if repair.is_sequential:
            layer.replace_experts(after)
            model.remember(layer, partial(_replace, layer, plan, repaired))
        del inputs, target, after  # before those of the next layer are made
    if not repair.is_sequential:
        remove(model, plan, repaired)
    return found


def repaired_names(model: MoEModel, repair: Repair) -> list[str]:
    """The parameters of ragged experts that a repair may change."""
    inputs = [layout_of(model.layers[0].experts).input_name] if repair.refits_inputs else []
    return [*inputs, "down_proj"]


@torch.no_grad()
def mask(model: MoEModel, plan: Plan, repaired: RepairedWeights | None = None) -> None:
    """Set the same rows, biases and columns to zero instead: the same function in the old shape. Arguments as
    for `remove`."""
    for layer in model.layers:
        model.change(layer, partial(_mask, layer, plan, repaired))


def _mask(layer: MoELayer, plan: Plan, repaired: RepairedWeights | None) -> None:
    """Zeros in a layer's experts for what is removed."""
    if layer.experts.down_proj.is_meta:
        return
    kept_matrices = matrices_of(_cut(layer, plan, repaired))
    for (matrices, kept_F, kept_G), left in zip(_with_masks(layer, plan), kept_matrices, strict=True):
        matrices.down_DF[:, kept_F] = left.down_DF
        matrices.inputs_GD[kept_G] = left.inputs_GD
        matrices.down_DF[:, ~kept_F] = 0
        matrices.inputs_GD[~kept_G] = 0
        if matrices.inputs_bias_G is not None:
            matrices.inputs_bias_G[~kept_G] = 0


def _cut(layer: MoELayer, plan: Plan, repaired: RepairedWeights | None) -> RaggedExperts:
    """New experts with the kept weights of a layer's."""
    widths = plan.layers[layer.index].sum(dim=1).tolist()
    experts = RaggedExperts(layer.experts, widths)
    if layer.experts.down_proj.is_meta:  # the shape alone, of a layer that is not in memory
        return experts
    experts.fill(_kept_matrices(layer, plan))
    changed = {} if repaired is None else repaired[layer.index]
    for name, tensor in changed.items():
        experts.get_parameter(name).copy_(tensor)
    return experts


def _kept_matrices(layer: MoELayer, plan: Plan) -> Iterator[Matrices]:
    """The kept weights of each expert."""
    for matrices, kept_F, kept_G in _with_masks(layer, plan):
        bias_G = matrices.inputs_bias_G
        if bias_G is not None:
            bias_G = bias_G[kept_G]
        yield Matrices(matrices.inputs_GD[kept_G], bias_G, matrices.down_DF[:, kept_F], matrices.down_bias_D)


def _with_masks(layer: MoELayer, plan: Plan) -> Iterator[tuple[Matrices, Tensor, Tensor]]:
    """Each expert's weights, with the masks of the kept atomic experts (F,) and of their rows of the input
    projection (G,)."""
    kept_EF = plan.layers[layer.index]
    assert kept_EF.shape == (layer.num_experts, layer.width), (layer.index, kept_EF.shape)
    rows = layout_of(layer.experts).rows
    for padded_F, matrices in zip(kept_EF, matrices_of(layer.experts), strict=True):
        width = matrices.down_DF.shape[1]
        kept_F = padded_F[:width].to(matrices.down_DF.device)
        yield matrices, kept_F, rows(kept_F)
