"""Surgery: apply a plan to a model by removing rows and columns, or by setting them to zero.

In: a dense or ragged model, a plan and optionally repaired weights. Out: the same model, changed in place,
layer by layer.
Shape letters: D model width, E experts, F atomic experts of an expert, G rows of the input projection.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from heapr.model.device import exact_products
from heapr.model.expert_inputs import ExpertInputs
from heapr.model.experts.layout import Matrices, layout_of, matrices_of
from heapr.model.experts.ragged import RaggedExperts
from heapr.model.layerwise import walk_layers
from heapr.model.moe import MoELayer, MoEModel
from heapr.model.stream import StreamTarget
from heapr.progress import progress
from heapr.pruning.activations import first_not_finite
from heapr.pruning.layer_repair import LayerRepair, Repair
from heapr.pruning.repaired import RepairedLayers
from heapr.ranks import ONE_PROCESS, Ranks
from heapr.types import Plan, RepairedWeights

NOTHING_LOST = LayerRepair(error_before=0.0, error_after=0.0, num_repaired=0)


@torch.no_grad()
def remove(model: MoEModel, plan: Plan, repaired: RepairedWeights | None = None) -> None:
    """Remove rows of W_gate and W_up, their biases, and columns of W_down (docs/method.md, 1).

    The experts become ragged. Each layer's old experts are freed before the next layer is cut.

    Args:
        model: dense or ragged.
        plan: for this model.
        repaired: the kept weights that repair changed. With None, all kept weights keep their values.
    """
    for layer in model.layers:
        model.change(layer, partial(_replace, layer, plan, repaired))


def _replace(layer: MoELayer, plan: Plan, repaired: RepairedWeights | None) -> None:
    """Replace a layer's experts by ragged ones with the kept weights."""
    layer.replace_experts(_cut(layer, plan, repaired))


@torch.no_grad()
@exact_products()
def remove_and_repair(
    model: MoEModel,
    plan: Plan,
    repair: Repair,
    batches: Sequence[Tensor],
    repaired: RepairedLayers | None = None,
    *,
    ranks: Ranks = ONE_PROCESS,
) -> dict[int, LayerRepair]:
    """Remove and repair layer by layer (docs/method.md, 18 to 23). Layers that lose nothing are not changed.

    Args:
        model: dense or ragged.
        plan: for this model.
        repair: the repair method.
        batches: calibration tokens, int64 (N, W) each.
        repaired: receives the weights that the repair may change. Layers that it already holds are not
            repaired again.
        ranks: the processes that repair together; all end with the same weights.

    Returns:
        what the repair reports for each layer, by decoder layer index.

    Raises:
        ConfigError: the repair follows the residual stream, and the model does not pass `check_stream`.
        FloatingPointError: NaN or infinity; the message names the layer, and the expert if it is known.
    """
    repaired = RepairedLayers() if repaired is None else repaired
    _forget_unfinished(repaired, ranks)
    names = _repaired_names(model, repair)
    walk = walk_layers(model, batches, follow_stream=repair.follows_stream, ranks=ranks)
    total, remark = len(model.layers), model.residency.remark
    bar = progress(walk, total=total, description="repair", unit="layer", remark=remark)
    for layer, inputs, target in bar:
        is_done = layer.index in repaired
        after = _cut(layer, plan, repaired if is_done else None)
        if not is_done:
            found = NOTHING_LOST
            if after.widths != tuple(layer.widths):
                found = _repair(layer, after, inputs, repair=repair, target=target, ranks=ranks)
            tensors = {name: after.get_parameter(name).detach() for name in names}
            # Processors may round differently.
            ranks.copy_first(tensors.values())
            repaired.add(layer.index, tensors, found)
        if repair.is_sequential:
            layer.replace_experts(after)
            model.remember(layer, partial(_replace, layer, plan, repaired))
        # Free them before those of the next layer are computed.
        del inputs, target, after
    if not repair.is_sequential:
        remove(model, plan, repaired)
    return repaired.found


def _repair(
    layer: MoELayer,
    after: RaggedExperts,
    inputs: ExpertInputs,
    *,
    repair: Repair,
    target: StreamTarget | None,
    ranks: Ranks,
) -> LayerRepair:
    """Repair a layer's experts after surgery, in place.

    Raises:
        FloatingPointError: see `remove_and_repair`.
    """
    problem: FloatingPointError | None = None
    try:
        found = repair(layer.experts, after, inputs, target=target, ranks=ranks)
        if math.isfinite(found.error_before) and math.isfinite(found.error_after):
            return found
    except FloatingPointError as error:
        problem = error
    expert = first_not_finite(layer.experts, inputs)
    place = f"layer {layer.index}" + ("" if expert is None else f", expert {expert}")
    raise FloatingPointError(
        f"repair: activations or outputs of {place} are NaN or infinite, or too large to be squared; use a"
        " wider model.dtype, or look at weights and text"
    ) from problem


def _forget_unfinished(repaired: RepairedLayers, ranks: Ranks) -> None:
    """Forget the layers that some rank has not repaired.

    After a crash, ranks may have finished different layers.
    """
    finished = ranks.gather(list(repaired))
    by_all = set.intersection(*map(set, finished))
    repaired.forget_all_but(by_all)


def _repaired_names(model: MoEModel, repair: Repair) -> list[str]:
    """Names of the ragged experts' parameters that a repair may change."""
    if not repair.refits_inputs:
        return ["down_proj"]
    layout = layout_of(model.layers[0].experts)
    return [layout.input_name, "down_proj"]


@torch.no_grad()
def mask(model: MoEModel, plan: Plan, repaired: RepairedWeights | None = None) -> None:
    """Set the rows, biases and columns that `remove` would remove to zero.

    The model computes the same function as after `remove`, and keeps its shape. The arguments are the same.
    """
    for layer in model.layers:
        model.change(layer, partial(_mask, layer, plan, repaired))


def _mask(layer: MoELayer, plan: Plan, repaired: RepairedWeights | None) -> None:
    """Set what is removed from a layer's experts to zero."""
    if layer.experts.down_proj.is_meta:
        return
    masks = _with_masks(layer, plan)
    kept_matrices = matrices_of(_cut(layer, plan, repaired))
    for (matrices, kept_F, kept_G), left in zip(masks, kept_matrices, strict=True):
        gone_F = ~kept_F
        gone_G = ~kept_G
        matrices.down_DF[:, kept_F] = left.down_DF
        matrices.inputs_GD[kept_G] = left.inputs_GD
        matrices.down_DF[:, gone_F] = 0
        matrices.inputs_GD[gone_G] = 0
        if matrices.inputs_bias_G is not None:
            matrices.inputs_bias_G[gone_G] = 0


def _cut(layer: MoELayer, plan: Plan, repaired: RepairedWeights | None) -> RaggedExperts:
    """New ragged experts with a layer's kept weights, repaired where repaired weights are given."""
    width_E = plan.layers[layer.index].sum(dim=1)
    experts = RaggedExperts(layer.experts, width_E.tolist())
    if layer.experts.down_proj.is_meta:
        # Only the shape, of a layer that is not in memory.
        return experts
    experts.fill(_kept_matrices(layer, plan))
    if repaired is not None:
        for name, tensor in repaired[layer.index].items():
            experts.get_parameter(name).copy_(tensor)
    return experts


def _kept_matrices(layer: MoELayer, plan: Plan) -> Iterator[Matrices]:
    """The kept weights of each expert."""
    for matrices, kept_F, kept_G in _with_masks(layer, plan):
        inputs_GD = matrices.inputs_GD[kept_G]
        bias_G = matrices.inputs_bias_G
        if bias_G is not None:
            bias_G = bias_G[kept_G]
        down_DF = matrices.down_DF[:, kept_F]
        yield Matrices(inputs_GD, bias_G, down_DF, matrices.down_bias_D)


def _with_masks(layer: MoELayer, plan: Plan) -> Iterator[tuple[Matrices, Tensor, Tensor]]:
    """Yield each expert's weights, and masks of its kept atomic experts (F,) and rows of inputs (G,)."""
    kept_EF = plan.layers[layer.index]
    shape = (layer.num_experts, layer.width)
    assert kept_EF.shape == shape, (layer.index, kept_EF.shape)
    rows = layout_of(layer.experts).rows
    for padded_F, matrices in zip(kept_EF, matrices_of(layer.experts), strict=True):
        down_DF = matrices.down_DF
        width = down_DF.shape[1]
        kept_F = padded_F[:width].to(down_DF.device)
        kept_G = rows(kept_F)
        yield matrices, kept_F, kept_G
