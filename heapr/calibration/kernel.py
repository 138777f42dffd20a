"""The sums over (token, expert) pairs in one Triton kernel: each activation and each gradient is read once.

In: h and dloss/dh, sorted by expert, router weights, offsets. Out: every statistic per atomic expert. Rows
are cut into tiles of one expert each, found on the device; a tile's sums are float32, and are then added in
float64, always in the same order. It imports Triton, which not every machine has: `segments.py` asks.
Shape letters: E experts, F atomic experts of an expert, S pairs sorted by expert, N tiles.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# In the order in which the kernel writes them.
SUMS = ("h_sq_sum_EF", "g_sq_sum_EF", "gh_sq_sum_EF", "gh_sum_EF", "h_abs_sum_EF", "ph_sq_sum_EF")
MAXIMUM = "ph_abs_max_EF"
TILE_ROWS = 256  # pairs that one program adds up
STEP_ROWS, STEP_COLUMNS = 16, 128  # what it holds at once


def tile_statistics(
    h_SF: Tensor, grad_SF: Tensor, router_weight_S: Tensor, offsets: Tensor
) -> dict[str, Tensor]:
    """Every statistic per atomic expert by its name in `LayerStatistics`, float64 (E, F); zero for experts
    without pairs. It does not wait for the device.

    Args:
        h_SF, grad_SF: activations and the loss' gradient with respect to them, of one dtype.
        router_weight_S: p.
        offsets: int64 (E+1,), on the same device.
    """
    num_pairs, width = h_SF.shape
    num_experts = len(offsets) - 1
    tile_offsets = _tile_offsets(offsets)
    # As many as there can be: each expert's last tile may be almost empty.
    num_tiles = triton.cdiv(num_pairs, TILE_ROWS) + num_experts
    bounds_N2 = _tile_bounds(offsets, tile_offsets, num_tiles)
    num_results = len(SUMS) + 1
    partial_NKF = h_SF.new_empty(num_tiles, num_results, width, dtype=torch.float32)
    num_steps = triton.cdiv(width, STEP_COLUMNS)
    add_up = _add_up_tiles[num_tiles, num_steps]
    add_up(
        h_SF.contiguous(),
        grad_SF.contiguous(),
        router_weight_S.contiguous(),
        bounds_N2,
        partial_NKF,
        width,
        NUM_RESULTS=num_results,
        STEP_ROWS=STEP_ROWS,
        STEP_COLUMNS=STEP_COLUMNS,
    )
    partial_NKF = partial_NKF.double()
    partial_sum_NKF = partial_NKF[:, :-1].contiguous()
    partial_max_NF = partial_NKF[:, -1].contiguous()
    sum_EKF = torch.segment_reduce(partial_sum_NKF, "sum", offsets=tile_offsets, unsafe=True)
    max_EF = torch.segment_reduce(partial_max_NF, "max", offsets=tile_offsets, unsafe=True, initial=0)
    sums = sum_EKF.unbind(1)
    statistics = dict(zip(SUMS, sums, strict=True))
    statistics[MAXIMUM] = max_EF
    return statistics


def _tile_offsets(offsets: Tensor) -> Tensor:
    """Expert e owns the tiles [e] to [e + 1]: (E+1,)."""
    count_E = offsets.diff()
    tiles_E = (count_E + (TILE_ROWS - 1)) // TILE_ROWS
    none = torch.zeros_like(offsets[:1])
    stop_E = tiles_E.cumsum(0)
    return torch.cat([none, stop_E])


def _tile_bounds(offsets: Tensor, tile_offsets: Tensor, num_tiles: int) -> Tensor:
    """First row of each tile and the one behind its last: (N, 2). A tile of no expert has no rows."""
    tile_N = torch.arange(num_tiles, device=offsets.device)
    num_experts = len(offsets) - 1
    place_N = torch.searchsorted(tile_offsets, tile_N, right=True) - 1
    is_used_N = place_N < num_experts
    expert_N = place_N.clamp(max=num_experts - 1)
    number_N = tile_N - tile_offsets[expert_N]
    first_N = offsets[expert_N] + number_N * TILE_ROWS
    expert_stop_N = offsets[expert_N + 1]
    stop_N = torch.minimum(first_N + TILE_ROWS, expert_stop_N)
    stop_N = torch.where(is_used_N, stop_N, first_N)
    return torch.stack([first_N, stop_N], dim=1)


@triton.jit  # type: ignore[untyped-decorator]
def _add_up_tiles(  # type: ignore[no-untyped-def]  # noqa: PLR0913, PLR0917 - of a kernel
    h_ptr, grad_ptr, p_ptr, bounds_ptr, out_ptr, width,
    NUM_RESULTS: tl.constexpr, STEP_ROWS: tl.constexpr, STEP_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Add up the rows of one tile, for `STEP_COLUMNS` atomic experts."""
    tile = tl.program_id(0)
    bounds_ptr += 2 * tile
    first = tl.load(bounds_ptr)
    stop = tl.load(bounds_ptr + 1)
    columns = tl.program_id(1) * STEP_COLUMNS + tl.arange(0, STEP_COLUMNS)
    is_column = columns < width
    zero = tl.zeros((STEP_ROWS, STEP_COLUMNS), tl.float32)
    h_sq = zero
    g_sq = zero
    gh_sq = zero
    gh_sum = zero
    h_abs = zero
    ph_sq = zero
    ph_max = zero
    for start in range(first, stop, STEP_ROWS):
        rows = start + tl.arange(0, STEP_ROWS)
        is_row = rows < stop
        is_there = is_row[:, None] & is_column[None, :]
        where = rows.to(tl.int64)[:, None] * width + columns[None, :]
        h = _loaded(h_ptr + where, is_there)
        g = _loaded(grad_ptr + where, is_there)
        p = _loaded(p_ptr + rows, is_row)
        gh = g * h
        ph = tl.abs(p[:, None] * h)
        h_sq += h * h
        g_sq += g * g
        gh_sq += gh * gh
        gh_sum += gh
        h_abs += tl.abs(h)
        ph_sq += ph * ph
        ph_max = tl.maximum(ph_max, ph)
    out_ptr += tile.to(tl.int64) * NUM_RESULTS * width + columns
    _store_sums(out_ptr, width, is_column, h_sq, g_sq, gh_sq, gh_sum, h_abs, ph_sq)
    out_ptr += (NUM_RESULTS - 1) * width
    tl.store(out_ptr, tl.max(ph_max, 0), mask=is_column)


@triton.jit  # type: ignore[untyped-decorator]
def _loaded(pointers, is_there):  # type: ignore[no-untyped-def]
    """float32; 0 where there is nothing."""
    values = tl.load(pointers, mask=is_there, other=0.0)
    return values.to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _store_sums(  # type: ignore[no-untyped-def]  # noqa: PLR0913, PLR0917 - in the order of SUMS
    out_ptr, width, is_column, h_sq, g_sq, gh_sq, gh_sum, h_abs, ph_sq
):  # fmt: skip
    """Write the sums below each other, from the row of `out_ptr` on."""
    tl.store(out_ptr, tl.sum(h_sq, 0), mask=is_column)
    out_ptr += width
    tl.store(out_ptr, tl.sum(g_sq, 0), mask=is_column)
    out_ptr += width
    tl.store(out_ptr, tl.sum(gh_sq, 0), mask=is_column)
    out_ptr += width
    tl.store(out_ptr, tl.sum(gh_sum, 0), mask=is_column)
    out_ptr += width
    tl.store(out_ptr, tl.sum(h_abs, 0), mask=is_column)
    out_ptr += width
    tl.store(out_ptr, tl.sum(ph_sq, 0), mask=is_column)
