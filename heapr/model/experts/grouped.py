"""The experts' forward by grouped matrix products: all experts of one width in one call, a GPU's way.

What it cannot serve (`is_grouped`) goes through loop.py. Dense experts never wait for the device; ragged ones
wait once a layer, for the numbers of tokens of each width. Copied beside pruned checkpoints and loaded where
heapr is not installed: it imports torch alone. Shape letters: layout.py; B experts of a bucket.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import Experts, activation_of, is_ragged, layout_of
from .loop import run_experts
from .packed import Bucket, buckets_of

ALIGNMENT_BYTES = 16  # what grouped_mm asks of strides and addresses
PROBE_COUNTS = [0, 5, 0, 11, 0]  # rows of each group in the probe of `grouped_mm_works`


class Pairs(NamedTuple):
    """What an observer's `add` gets in the backward pass of the grouped forward, once for each bucket.

    Attributes:
        experts: which of the layer's.
        offsets: int64 (B+1,): the bucket's b-th expert owns the rows offsets[b] to offsets[b + 1]. Rows
            behind the last are of no expert.
        h_SF, grad_SF: intermediate activations, and the loss' gradient with respect to them.
        router_weight_S: p of each pair.
        output_norm_S: ||E(x)|| before p multiplies it, float32.
    """

    experts: slice | Tensor
    offsets: Tensor
    h_SF: Tensor
    grad_SF: Tensor
    router_weight_S: Tensor
    output_norm_S: Tensor


class Routed(NamedTuple):
    """The (token, expert) pairs, sorted by bucket and expert.

    Attributes:
        token_S, router_weight_S: of each pair.
        position_TK: where a token's pairs are; 0 for those without an expert.
        is_routed_TK: whether a pair has an expert.
        bounds: where the rows of each bucket begin and end.
        offsets: of each bucket, as in `Pairs`.
    """

    token_S: Tensor
    router_weight_S: Tensor
    position_TK: Tensor
    is_routed_TK: Tensor
    bounds: list[int]
    offsets: list[Tensor]


class Layer(NamedTuple):
    """The part of an experts module that the products below need; `add` is its observer's, if it has one."""

    buckets: Sequence[Bucket]
    activation: Callable[[Tensor], Tensor]
    add: Callable[[Pairs], None] | None


def run_fastest(experts: Experts, hidden_TD: Tensor, *routing: Tensor) -> Tensor:
    """Like `run_experts`, by grouped products on a GPU where these serve the experts, else by the loop."""
    if hidden_TD.device.type == "cuda" and is_grouped(experts, hidden_TD):
        return run_grouped(experts, hidden_TD, *routing)
    return run_experts(experts, hidden_TD, *routing)


def is_grouped(experts: Experts, hidden_TD: Tensor) -> bool:
    """Whether `run_grouped` serves an experts module and its input.

    It does not serve experts with biases, experts that weigh their input, rows that are no multiple of 16
    bytes, weights that train, an observer without `add`, or a build of torch whose grouped_mm is wrong
    (`grouped_mm_works`). It does serve transposed matrices, and alternating rows of gate and up.
    """
    layout = layout_of(experts)
    if layout.has_bias or layout.weighs_input or 0 in hidden_TD.shape:
        return False
    down = experts.down_proj
    inputs = getattr(experts, layout.input_name)
    if down.dtype != hidden_TD.dtype or down.device != hidden_TD.device:
        return False
    trains = down.requires_grad or inputs.requires_grad
    if trains and torch.is_grad_enabled():
        return False
    observer = getattr(experts, "observer", None)
    if observer is not None and not hasattr(observer, "add"):
        return False
    if is_ragged(experts):
        # Their copies are aligned if their strides are.
        down = down[:0]
        inputs = inputs[:0]
    are_aligned = _is_aligned(down) and _is_aligned(inputs)
    return are_aligned and grouped_mm_works(down.device.type, down.dtype)


@functools.cache
def grouped_mm_works(device: str, dtype: torch.dtype) -> bool:
    """Whether this build's grouped_mm gives what single products give.

    Asked in both memory layouts, with groups that are empty at the beginning, in the middle and at the end.
    Waits for the device, once per process.
    """
    if not hasattr(F, "grouped_mm"):
        return False
    rows_SD = _ramp(16, 32, device=device).to(dtype)
    weights_EGD = _ramp(len(PROBE_COUNTS), 48, 32, device=device).to(dtype)
    counts = torch.tensor(PROBE_COUNTS, device=device)
    ends = counts.cumsum(0, dtype=torch.int32)
    try:
        there_SG = F.grouped_mm(rows_SD, weights_EGD.transpose(1, 2), offs=ends)
        back_SD = F.grouped_mm(there_SG, weights_EGD, offs=ends)
    except (RuntimeError, NotImplementedError):
        return False
    is_there = _is_probe_product(there_SG, rows_SD, weights_EGD.mT)
    return is_there and _is_probe_product(back_SD, there_SG, weights_EGD)


def _ramp(*shape: int, device: str) -> Tensor:
    """Numbers from -1 to 1, equally far apart."""
    numbers = torch.linspace(-1, 1, math.prod(shape), device=device)
    return numbers.view(shape)


def _is_probe_product(got: Tensor, rows_S: Tensor, matrices_E: Tensor) -> bool:
    """Whether a grouped product of the probe's rows is what single products give, to 4 roundings."""
    rows_E = rows_S.double().split(PROBE_COUNTS)
    products = [rows_n @ matrix for rows_n, matrix in zip(rows_E, matrices_E.double(), strict=True)]
    expected = torch.cat(products)
    tolerance = 4 * torch.finfo(got.dtype).eps
    error = (got.double() - expected).norm()
    return bool(error <= tolerance * expected.norm())


def run_grouped(experts: Experts, hidden_TD: Tensor, *routing: Tensor) -> Tensor:
    """Sum over each token's experts of p * E(x), like `run_experts`.

    Gradients reach tokens and router weights, not the experts' weights. An observer's `add` is called in the
    backward pass. One tensor (S, G) is kept until then: the inputs of the activation function.

    Args:
        experts: that `is_grouped` accepts.
    """
    expert_TK, router_weight_TK = routing
    observer = getattr(experts, "observer", None)
    buckets = buckets_of(experts)
    if observer is None:
        # Experts without atomic experts contribute nothing.
        buckets = [bucket for bucket in buckets if bucket.down_BDF.shape[2]]
    if not buckets:
        return torch.zeros_like(hidden_TD)
    add = None if observer is None else observer.add
    layer = Layer(buckets, activation_of(experts), add)
    routed = _sorted(buckets, expert_TK, router_weight_TK, experts.num_experts)
    total_TD: Tensor = _Grouped.apply(hidden_TD, router_weight_TK, routed, layer)
    return total_TD


class _Grouped(torch.autograd.Function):
    """Forward and backward of a layer's experts, with nothing but `pre_SG` of each bucket kept in between."""

    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, router_weight_TK: Tensor, routed: Routed, layer: Layer
    ) -> Tensor:
        saved, outputs = [], []
        for bucket, rows, offsets in _of_buckets(routed, layer):
            ends = _ends(offsets, rows)
            token_S = routed.token_S[rows]
            pre_SG = _product(hidden_TD[token_S], bucket.inputs_BGD.mT, ends)
            h_SF = layer.activation(pre_SG)
            output_SD = _product(h_SF, bucket.down_BDF.mT, ends)
            saved.append(pre_SG)
            outputs.append(output_SD)
            # Free it before the next bucket's is computed.
            del h_SF
        output_SD = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
        if layer.add is not None:
            norm_S = torch.linalg.vector_norm(output_SD, dim=1, dtype=torch.float32)
            saved.append(norm_S)
        ctx.routed = routed
        ctx.layer = layer
        ctx.save_for_backward(*saved)
        return _summed(output_SD, routed, router_weight_TK)

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor, None, None]:
        routed, layer = ctx.routed, ctx.layer
        saved = ctx.saved_tensors
        grads_hidden, grads_p = [], []
        for pre_SG, (bucket, rows, offsets) in zip(saved, _of_buckets(routed, layer), strict=False):
            ends = _ends(offsets, rows)
            p_S = routed.router_weight_S[rows]
            token_S = routed.token_S[rows]
            # dloss/dh = p W_down^T dloss/dy; without p, its product with h is dloss/dp.
            unweighted_SF = _product(grad_TD[token_S], bucket.down_BDF, ends)
            h_SF, pull = _pullback(layer.activation, pre_SG)
            grad_p_S = (h_SF * unweighted_SF).sum(1, dtype=torch.float32)
            grads_p.append(grad_p_S)
            grad_SF = (unweighted_SF * p_S.unsqueeze(1)).to(h_SF.dtype)
            if layer.add is not None:
                norm_S = saved[-1][rows]
                layer.add(Pairs(bucket.experts, offsets, h_SF, grad_SF, p_S, norm_S))
            grad_SD = _product(pull(grad_SF), bucket.inputs_BGD, ends)
            grads_hidden.append(grad_SD)
        one_TK = routed.is_routed_TK.to(grad_TD.dtype)
        grad_hidden_TD = _summed(torch.cat(grads_hidden), routed, one_TK)
        grad_p_S = torch.cat(grads_p)
        grad_p_TK = grad_p_S[routed.position_TK] * routed.is_routed_TK
        return grad_hidden_TD, grad_p_TK.to(routed.router_weight_S.dtype), None, None


def _sorted(
    buckets: Sequence[Bucket], expert_TK: Tensor, router_weight_TK: Tensor, num_experts: int
) -> Routed:
    """The pairs in the buckets' order."""
    device = expert_TK.device
    rank_TK, sizes = _ranked(buckets, expert_TK, num_experts)
    num_ranked = sum(sizes)
    rank_S, order_S = torch.sort(rank_TK.reshape(-1), stable=True)
    # Not bincount, which waits for the device.
    ranks = torch.arange(num_ranked + 1, device=device)
    offsets = torch.searchsorted(rank_S, ranks)
    firsts = list(accumulate(sizes, initial=0))
    bounds = [0, len(order_S)] if len(buckets) == 1 else offsets[firsts].tolist()
    offsets_B = []
    for first, last in pairwise(firsts):
        own_offsets = offsets[first : last + 1]
        offsets_B.append(own_offsets - offsets[first])
    order_S = order_S[: bounds[-1]]
    row_S = torch.arange(len(order_S), device=device)
    position_S = torch.zeros(rank_S.shape, dtype=torch.int64, device=device)
    position_S.scatter_(0, order_S, row_S)
    num_chosen = expert_TK.shape[1]
    router_weight_S = router_weight_TK.detach().reshape(-1)
    return Routed(
        token_S=order_S // num_chosen,
        router_weight_S=router_weight_S[order_S],
        position_TK=position_S.view_as(expert_TK),
        is_routed_TK=rank_TK < num_ranked,
        bounds=bounds,
        offsets=offsets_B,
    )


def _ranked(buckets: Sequence[Bucket], expert_TK: Tensor, num_experts: int) -> tuple[Tensor, list[int]]:
    """Each pair's expert by its place in the buckets' order, and how many experts each bucket has.

    Experts in no bucket are behind all others, with those that are none.
    """
    chosen_B = [bucket.experts for bucket in buckets if isinstance(bucket.experts, Tensor)]
    if not chosen_B:
        return expert_TK, [num_experts]
    sizes = [len(chosen) for chosen in chosen_B]
    num_ranked = sum(sizes)
    device = expert_TK.device
    rank_E1 = torch.full((num_experts + 1,), num_ranked, device=device)
    rank_E1[torch.cat(chosen_B)] = torch.arange(num_ranked, device=device)
    return rank_E1[expert_TK], sizes


def _of_buckets(routed: Routed, layer: Layer) -> list[tuple[Bucket, slice, Tensor]]:
    """Each bucket with its rows, and the offsets of its experts among these."""
    rows = [slice(first, last) for first, last in pairwise(routed.bounds)]
    return list(zip(layer.buckets, rows, routed.offsets, strict=True))


def _ends(offsets: Tensor, rows: slice) -> Tensor:
    """Where each expert's rows end, for grouped_mm.

    The last expert also gets the rows of no expert: grouped_mm would leave their results as they are in
    memory, where anything may be.
    """
    ends = offsets[1:].to(torch.int32, copy=True)
    ends[-1:] = rows.stop - rows.start
    return ends


def _product(rows_S: Tensor, matrices_B: Tensor, ends: Tensor) -> Tensor:
    """Every expert's rows times its matrix."""
    if 0 in rows_S.shape or 0 in matrices_B.shape:
        return rows_S.new_zeros(len(rows_S), matrices_B.shape[2])
    return F.grouped_mm(rows_S, matrices_B, offs=ends)


def _pullback(
    activation: Callable[[Tensor], Tensor], pre_SG: Tensor
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """h, and what takes dloss/dh to dloss/dpre."""
    leaf_SG = pre_SG.detach().requires_grad_()
    with torch.enable_grad():
        h_SF = activation(leaf_SG)

    def pull(grad_SF: Tensor) -> Tensor:
        (grad_SG,) = torch.autograd.grad(h_SF, leaf_SG, grad_SF)
        return grad_SG

    return h_SF.detach(), pull


def _summed(rows_SD: Tensor, routed: Routed, weight_TK: Tensor) -> Tensor:
    """Each token's rows times their weights, added in the order of the token's experts: (T, D)."""
    if not len(rows_SD):
        return rows_SD.new_zeros(len(weight_TK), rows_SD.shape[1])
    weight_TK = torch.where(routed.is_routed_TK, weight_TK, 0)
    rows_TKD = rows_SD[routed.position_TK]
    if weight_TK.dtype != rows_SD.dtype:
        # A family that keeps router weights in float32.
        weighted_TKD = rows_TKD * weight_TK.unsqueeze(2)
        return weighted_TKD.sum(1).to(rows_SD.dtype)
    weight_T1K = weight_TK.unsqueeze(1)
    return torch.bmm(weight_T1K, rows_TKD).squeeze(1)


def _is_aligned(tensor: Tensor) -> bool:
    """Whether grouped_mm takes a tensor: its address and all strides but a 1 are multiples of 16 bytes."""
    if tensor.data_ptr() % ALIGNMENT_BYTES:
        return False
    smallest, *others = sorted(tensor.stride())
    if smallest != 1:
        return False
    item = tensor.element_size()
    return all(stride * item % ALIGNMENT_BYTES == 0 for stride in others)
