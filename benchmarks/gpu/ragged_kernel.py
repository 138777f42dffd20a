"""Ragged experts in two persistent Triton kernels: a candidate, until a GPU has shown whether it pays.

In: a ragged layer without biases, whose activation is silu(gate) * up, and its routed tokens. Out: what
`run_experts` gives; no gradients. Nothing waits for the device and all shapes follow from the inputs' shapes,
so it is made for torch.compile (an operator with a fake implementation) and for CUDA graphs.
Weights are read where they are stored: nothing is packed, and no FLOP is spent on padding beyond a tile.
Shape letters: T tokens, D model width, E experts, K experts per token, S pairs sorted by expert, F atomic
experts of the widest expert, M and N rows and columns of a tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from heapr.model.experts.layout import Experts, layout_of

H_ALIGNMENT = 64
PROGRAMS_ON_CPU = 3  # of the interpreter, fewer than there are tiles
# Rows, columns and depth of a tile, warps and stages; by the most pairs that an expert has on average.
TILES = ((16, (16, 64, 128, 4, 4)), (64, (64, 128, 64, 4, 4)), (2**62, (128, 128, 64, 8, 3)))


def is_served(experts: Experts) -> bool:
    """Whether these experts have the one layout that the kernels know; the activation is not looked at."""
    layout = layout_of(experts)
    return layout.has_gate and layout.is_concatenated and not (layout.has_bias or layout.weighs_input)


def run_persistent(
    experts: Experts, hidden_TD: Tensor, expert_TK: Tensor, router_weight_TK: Tensor
) -> Tensor:
    """Sum over each token's experts of p * E(x)."""
    assert is_served(experts)
    widths = torch.tensor(experts.widths, device="cpu")
    width_E = _on_device(experts, "width_E", widths, hidden_TD.device)
    output: Tensor = torch.ops.heapr_candidate.ragged_experts(
        hidden_TD, expert_TK, router_weight_TK, experts.gate_up_proj, experts.down_proj, width_E,
        int(widths.max()),
    )  # fmt: skip
    return output


@torch.library.custom_op("heapr_candidate::ragged_experts", mutates_args=())
def ragged_experts(
    hidden_TD: Tensor,
    expert_TK: Tensor,
    router_weight_TK: Tensor,
    gate_up_GD: Tensor,
    down_RD: Tensor,
    width_E: Tensor,
    widest: int,
) -> Tensor:
    """See `run_persistent`; width_E is int64 on the device, with the widest as a number beside it."""
    (num_tokens, model_width), num_choices = hidden_TD.shape, expert_TK.shape[1]
    num_experts = len(width_E)
    sorted_S, order_S = torch.sort(expert_TK.reshape(-1), stable=True)
    # One more expert of width 0 takes the pairs of no expert.
    widths = torch.cat([width_E, width_E.new_zeros(1)])
    start_of_expert = widths.cumsum(0) - widths
    numbers = torch.arange(num_experts + 2, device=sorted_S.device)
    offsets = torch.searchsorted(sorted_S, numbers)
    rows, columns, depth, warps, stages = tile_of(len(sorted_S), num_experts)
    # Every row begins at an aligned address; columns beyond an expert's own are neither written nor read.
    h_SF = hidden_TD.new_empty(len(sorted_S), -(-widest // H_ALIGNMENT) * H_ALIGNMENT)
    output_SD = hidden_TD.new_empty(len(sorted_S), model_width)
    tables = (offsets, widths, start_of_expert)
    size = {
        "TILE_M": rows,
        "TILE_N": columns,
        "TILE_K": depth,
        "EXPERTS": triton.next_power_of_2(num_experts + 1),
    }
    launch = {**size, "num_warps": warps, "num_stages": stages}
    grid = (num_programs(hidden_TD.device, rows),)
    tiles_M = (offsets.diff() + rows - 1) // rows
    ends = (tiles_M * ((widths + columns - 1) // columns)).cumsum(0)
    _activations[grid](
        hidden_TD, gate_up_GD, h_SF, order_S, ends, *tables, num_experts + 1, model_width,
        h_SF.shape[1], num_choices, **launch,
    )  # fmt: skip
    ends = (tiles_M * triton.cdiv(model_width, columns)).cumsum(0)
    _outputs[grid](
        h_SF, down_RD, router_weight_TK, output_SD, order_S, ends, *tables, num_experts + 1, model_width,
        h_SF.shape[1], **launch,
    )  # fmt: skip
    return output_SD.view(num_tokens, num_choices, model_width).sum(1)  # always in this order


@ragged_experts.register_fake
def _(hidden_TD: Tensor, *_: object) -> Tensor:
    return torch.empty_like(hidden_TD)


def tile_of(num_pairs: int, num_experts: int) -> tuple[int, int, int, int, int]:
    """Small tiles where experts have few pairs, as in decode."""
    pairs_of_expert = num_pairs / num_experts
    return next(tile for limit, tile in TILES if pairs_of_expert <= limit)


def num_programs(device: torch.device, rows: int) -> int:
    """As many as run side by side: two of small tiles share a multiprocessor."""
    if device.type != "cuda":
        return PROGRAMS_ON_CPU
    num_processors: int = torch.cuda.get_device_properties(device).multi_processor_count
    return num_processors * (2 if rows == TILES[0][1][0] else 1)


def _on_device(experts: Experts, name: str, value: Tensor, device: torch.device) -> Tensor:
    """A constant of a module, copied to the device once."""
    known: Tensor | None = getattr(experts, name, None)
    if known is None or known.device != device:
        known = value.to(device)
        setattr(experts, name, known)
    return known


@triton.jit
def _find_tile(tile, ends_ptr, offsets_ptr, num_experts, TILE_M: tl.constexpr, EXPERTS: tl.constexpr):
    """Whose tile it is, its first row and the row behind its expert's last, its number among the columns."""
    numbers = tl.arange(0, EXPERTS)
    ends = tl.load(ends_ptr + numbers, mask=numbers < num_experts, other=2**62)
    expert = tl.sum((ends <= tile).to(tl.int32), 0)
    before = tl.max(tl.where(ends <= tile, ends, 0), 0)
    first = tl.load(offsets_ptr + expert)
    stop = tl.load(offsets_ptr + expert + 1)
    tiles_m = (stop - first + TILE_M - 1) // TILE_M
    local = tile - before
    return expert, first + (local % tiles_m) * TILE_M, stop, local // tiles_m


@triton.jit
def _activations(
    hidden_ptr, gate_up_ptr, h_ptr, order_ptr, ends_ptr, offsets_ptr, widths_ptr, starts_ptr,
    num_experts, model_width, h_stride, num_choices,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    num_tiles = tl.load(ends_ptr + num_experts - 1)
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        expert, first, stop, tile_n = _find_tile(tile, ends_ptr, offsets_ptr, num_experts, TILE_M, EXPERTS)
        width = tl.load(widths_ptr + expert)
        start = tl.load(starts_ptr + expert)
        rows = first + tl.arange(0, TILE_M)
        columns = tile_n * TILE_N + tl.arange(0, TILE_N)
        depth = tl.arange(0, TILE_K)
        is_row = rows < stop
        is_column = columns < width
        token = tl.load(order_ptr + rows, mask=is_row, other=0) // num_choices
        hidden_ptrs = hidden_ptr + token[:, None] * model_width + depth[None, :]
        gate_ptrs = gate_up_ptr + (2 * start + columns)[None, :] * model_width + depth[:, None]
        up_ptrs = gate_ptrs + width * model_width
        gate = tl.zeros((TILE_M, TILE_N), tl.float32)
        up = tl.zeros((TILE_M, TILE_N), tl.float32)
        for k in range(0, model_width, TILE_K):
            is_deep = k + depth < model_width
            x = tl.load(hidden_ptrs + k, mask=is_row[:, None] & is_deep[None, :], other=0.0)
            w_gate = tl.load(gate_ptrs + k, mask=is_column[None, :] & is_deep[:, None], other=0.0)
            w_up = tl.load(up_ptrs + k, mask=is_column[None, :] & is_deep[:, None], other=0.0)
            gate = tl.dot(x, w_gate, gate, input_precision="ieee")
            up = tl.dot(x, w_up, up, input_precision="ieee")
        h = gate * tl.sigmoid(gate) * up
        h_ptrs = h_ptr + rows.to(tl.int64)[:, None] * h_stride + columns[None, :]
        tl.store(h_ptrs, h.to(h_ptr.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


@triton.jit
def _outputs(
    h_ptr, down_ptr, p_ptr, output_ptr, order_ptr, ends_ptr, offsets_ptr, widths_ptr, starts_ptr,
    num_experts, model_width, h_stride,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    num_tiles = tl.load(ends_ptr + num_experts - 1)
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        expert, first, stop, tile_n = _find_tile(tile, ends_ptr, offsets_ptr, num_experts, TILE_M, EXPERTS)
        width = tl.load(widths_ptr + expert)
        start = tl.load(starts_ptr + expert)
        rows = first + tl.arange(0, TILE_M)
        columns = tile_n * TILE_N + tl.arange(0, TILE_N)
        depth = tl.arange(0, TILE_K)
        is_row = rows < stop
        is_column = columns < model_width
        h_ptrs = h_ptr + rows.to(tl.int64)[:, None] * h_stride + depth[None, :]
        down_ptrs = down_ptr + (start + depth)[:, None] * model_width + columns[None, :]
        total = tl.zeros((TILE_M, TILE_N), tl.float32)
        for k in range(0, width, TILE_K):
            is_deep = k + depth < width
            h = tl.load(h_ptrs + k, mask=is_row[:, None] & is_deep[None, :], other=0.0)
            w = tl.load(down_ptrs + k * model_width, mask=is_deep[:, None] & is_column[None, :], other=0.0)
            total = tl.dot(h, w, total, input_precision="ieee")
        pair = tl.load(order_ptr + rows, mask=is_row, other=0)
        p = tl.load(p_ptr + pair, mask=is_row, other=0.0).to(tl.float32)
        output_ptrs = output_ptr + pair[:, None] * model_width + columns[None, :]
        weighted = (total * p[:, None]).to(output_ptr.dtype.element_ty)
        tl.store(output_ptrs, weighted, mask=is_row[:, None] & is_column[None, :])
