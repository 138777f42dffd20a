"""Experts of one width side by side, as grouped products want them; ragged experts are copied for it.

In: an experts module. Out: its `Bucket`s. Copied beside pruned checkpoints and loaded where heapr is not
installed: it imports torch alone. Shape letters: layout.py; B experts of a bucket.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .layout import Experts, Layout, Matrices, is_ragged, layout_of, matrices_of, widths_of

WIDTH_STEP = 64  # ragged widths are rounded up to multiples of it
ALIGNED_WIDTH = 8  # widths that are multiples of it have strides that grouped_mm takes, in every dtype


class Bucket(NamedTuple):
    """Experts of one width, or filled up to one with zeros.

    Attributes:
        experts: which of the layer's.
        inputs_BGD, down_BDF: their weights.
    """

    experts: slice | Tensor
    inputs_BGD: Tensor
    down_BDF: Tensor


class Packed(NamedTuple):
    """Copies of ragged experts' weights, and the state of the weights that they were made of."""

    state: list[Any]
    buckets: list[Bucket]


def buckets_of(experts: Experts) -> list[Bucket]:
    """The weights of an experts module, for grouped products.

    Dense experts are one bucket of their own memory. Ragged ones are copied and filled up with zeros. The
    copy is kept in the module's attribute `packed` until a weight changes. It takes as much memory as the
    experts themselves, and what rounding widths up to multiples of 64 adds.
    """
    if not is_ragged(experts):
        return [_as_stored(experts)]
    state = _state_of(experts)
    packed: Packed | None = experts.packed
    if packed is None or packed.state != state:
        packed = experts.packed = Packed(state, pack(experts))
    return packed.buckets


def _as_stored(experts: Experts) -> Bucket:
    """Dense experts in their own memory."""
    layout = layout_of(experts)
    inputs_BGD = getattr(experts, layout.input_name).detach()
    down_BDF = experts.down_proj.detach()
    if layout.is_transposed:
        inputs_BGD = inputs_BGD.mT
        down_BDF = down_BDF.mT
    return Bucket(slice(None), inputs_BGD, down_BDF)


@torch.no_grad()
def pack(experts: Experts) -> list[Bucket]:
    """Copy ragged experts' weights, by width; experts of width 0 come last, in a bucket of width 0."""
    matrices_E = list(matrices_of(experts))
    buckets = []
    for width, members in width_buckets(widths_of(experts)).items():
        chosen = [matrices_E[expert] for expert in members]
        inputs_BGD, down_BDF = _side_by_side(layout_of(experts), chosen, width)
        member_B = torch.tensor(members, device=down_BDF.device)
        buckets.append(Bucket(member_B, inputs_BGD, down_BDF))
    return buckets


def _side_by_side(layout: Layout, matrices_B: Sequence[Matrices], width: int) -> tuple[Tensor, Tensor]:
    """Input projections (B, G, D) and down projections (B, D, F) of some experts, filled up to one width."""
    like_DF = matrices_B[0].down_DF
    num_experts, model_width = len(matrices_B), len(like_DF)
    num_rows = 2 * width if layout.has_gate else width
    inputs_BGD = like_DF.new_zeros(num_experts, num_rows, model_width)
    down_BDF = like_DF.new_zeros(num_experts, model_width, width)
    place_F = torch.arange(width, device="cpu")
    for matrices, inputs_GD, down_DF in zip(matrices_B, inputs_BGD, down_BDF, strict=True):
        own_width = matrices.down_DF.shape[1]
        is_own_G = layout.rows(place_F < own_width)
        # An index, because a GPU would have to be asked how many rows a mask has.
        row_G = is_own_G.nonzero().squeeze(1)
        inputs_GD.index_copy_(0, row_G.to(like_DF.device), matrices.inputs_GD)
        down_DF[:, :own_width] = matrices.down_DF
    return inputs_BGD, down_BDF


def width_buckets(widths: Sequence[int], step: int = WIDTH_STEP) -> dict[int, list[int]]:
    """Experts by width, rounded up to a multiple of `step`, the largest width first.

    No width is rounded beyond that of the widest expert, if that one is aligned.
    """
    widest = max(widths)
    limit = widest if widest % ALIGNED_WIDTH == 0 else widest + step
    buckets: dict[int, list[int]] = {}
    for expert, width in enumerate(widths):
        rounded = -(-width // step) * step
        members = buckets.setdefault(min(rounded, limit), [])
        members.append(expert)
    largest_first = sorted(buckets.items(), reverse=True)
    return dict(largest_first)


def packed_bytes(experts: Experts) -> tuple[int, int]:
    """Memory of ragged experts' weights, and of the copies that the grouped forward makes of them."""
    own = sum(weight.nbytes for weight in _weights(experts))
    copies = 0
    for bucket in buckets_of(experts):
        copies += bucket.inputs_BGD.nbytes + bucket.down_BDF.nbytes
    return own, copies


def _state_of(experts: Experts) -> list[Any]:
    """Changes whenever a weight does."""
    state: list[Any] = []
    for weight in _weights(experts):
        version = 0 if weight.is_inference() else weight._version
        state += [weight.data_ptr(), weight.device, version]
    return state


def _weights(experts: Experts) -> tuple[Tensor, Tensor]:
    """The tensors that hold all input projections and all down projections."""
    layout = layout_of(experts)
    return getattr(experts, layout.input_name), experts.down_proj
