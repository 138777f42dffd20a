"""Experts of one width side by side, as grouped products want them; ragged experts are copied for it.

In: an experts module. Out: its `Bucket`s. Copied beside pruned checkpoints and loaded where heapr is not
installed: it imports torch alone. Shape letters: layout.py; B experts of a bucket.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .layout import Experts, is_ragged, layout_of, matrices_of, widths_of

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
        layout = layout_of(experts)
        inputs, down = getattr(experts, layout.input_name), experts.down_proj
        stored = (inputs.mT, down.mT) if layout.is_transposed else (inputs, down)
        return [Bucket(slice(None), stored[0].detach(), stored[1].detach())]
    state = _state_of(experts)
    packed: Packed | None = experts.packed
    if packed is None or packed.state != state:
        packed = experts.packed = Packed(state, pack(experts))
    return packed.buckets


@torch.no_grad()
def pack(experts: Experts) -> list[Bucket]:
    """Copy ragged experts' weights, by width; experts of width 0 come last, in a bucket of width 0."""
    layout, widths, matrices_E = layout_of(experts), widths_of(experts), list(matrices_of(experts))
    buckets = []
    for width, members in width_buckets(widths).items():
        num_rows = (2 if layout.has_gate else 1) * width
        like, model_width = experts.down_proj, int(experts.down_proj.shape[1])
        inputs_BGD = like.new_zeros(len(members), num_rows, model_width)
        down_BDF = like.new_zeros(len(members), model_width, width)
        for place, expert in enumerate(members):
            own_F = torch.arange(width, device="cpu") < widths[expert]
            # An index, because a GPU would have to be asked how many rows a mask has.
            row_G = layout.rows(own_F).nonzero().squeeze(1).to(like.device)
            inputs_BGD[place].index_copy_(0, row_G, matrices_E[expert].inputs_GD)
            down_BDF[place, :, : widths[expert]] = matrices_E[expert].down_DF
        buckets.append(Bucket(torch.tensor(members, device=like.device), inputs_BGD, down_BDF))
    return buckets


def width_buckets(widths: Sequence[int], step: int = WIDTH_STEP) -> dict[int, list[int]]:
    """Experts by width, rounded up to a multiple of `step`, the largest width first.

    No width is rounded beyond that of the widest expert, if that one is aligned.
    """
    widest = max(widths)
    limit = widest if widest % ALIGNED_WIDTH == 0 else widest + step
    buckets: dict[int, list[int]] = {}
    for expert, width in enumerate(widths):
        rounded = -(-width // step) * step
        buckets.setdefault(min(rounded, limit), []).append(expert)
    return dict(sorted(buckets.items(), reverse=True))


def packed_bytes(experts: Experts) -> tuple[int, int]:
    """Memory of ragged experts' weights, and of the copies that the grouped forward makes of them."""
    own = experts.down_proj.nbytes + getattr(experts, layout_of(experts).input_name).nbytes
    copies = sum(bucket.inputs_BGD.nbytes + bucket.down_BDF.nbytes for bucket in buckets_of(experts))
    return own, copies


def _state_of(experts: Experts) -> list[Any]:
    """Changes whenever a weight does."""
    state: list[Any] = []
    for weight in (getattr(experts, layout_of(experts).input_name), experts.down_proj):
        state += [weight.data_ptr(), weight.device, 0 if weight.is_inference() else weight._version]
    return state
