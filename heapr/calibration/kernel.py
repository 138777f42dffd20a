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
    tile_offsets = _tile_offsets(offsets)
    # As many as there can be: each expert's last tile may be almost empty.
    num_tiles = -(-num_pairs // TILE_ROWS) + len(offsets) - 1
    bounds_N2 = _tile_bounds(offsets, tile_offsets, num_tiles)
    partial_NKF = h_SF.new_empty(num_tiles, len(SUMS) + 1, width, dtype=torch.float32)
    grid = (num_tiles, triton.cdiv(width, STEP_COLUMNS))
    _add_up_tiles[grid](
        h_SF.contiguous(), grad_SF.contiguous(), router_weight_S.contiguous(), bounds_N2, partial_NKF, width,
        STEP_ROWS=STEP_ROWS, STEP_COLUMNS=STEP_COLUMNS,
    )  # fmt: skip
    partial_NKF = partial_NKF.double()
    reduce = torch.segment_reduce
    sum_EKF = reduce(partial_NKF[:, :-1].contiguous(), "sum", offsets=tile_offsets, unsafe=True)
    max_EF = reduce(partial_NKF[:, -1].contiguous(), "max", offsets=tile_offsets, unsafe=True, initial=0)
    return dict(zip(SUMS, sum_EKF.unbind(1), strict=True)) | {MAXIMUM: max_EF}


def _tile_offsets(offsets: Tensor) -> Tensor:
    """Expert e owns the tiles [e] to [e + 1]: (E+1,)."""
    tiles_E = (offsets.diff() + (TILE_ROWS - 1)) // TILE_ROWS
    return torch.cat([torch.zeros_like(offsets[:1]), tiles_E.cumsum(0)])


def _tile_bounds(offsets: Tensor, tile_offsets: Tensor, num_tiles: int) -> Tensor:
    """First row of each tile and the one behind its last: (N, 2). A tile of no expert has no rows."""
    tile_N = torch.arange(num_tiles, device=offsets.device)
    num_experts = len(offsets) - 1
    expert_N = torch.searchsorted(tile_offsets, tile_N, right=True) - 1
    is_used_N = expert_N < num_experts
    expert_N = expert_N.clamp(max=num_experts - 1)
    first_N = offsets[expert_N] + (tile_N - tile_offsets[expert_N]) * TILE_ROWS
    stop_N = torch.minimum(first_N + TILE_ROWS, offsets[expert_N + 1])
    return torch.stack([first_N, torch.where(is_used_N, stop_N, first_N)], dim=1)


@triton.jit  # type: ignore[untyped-decorator]
def _add_up_tiles(  # type: ignore[no-untyped-def]  # noqa: PLR0913, PLR0917 - of a kernel
    h_ptr, grad_ptr, p_ptr, bounds_ptr, out_ptr, width, STEP_ROWS: tl.constexpr, STEP_COLUMNS: tl.constexpr
):  # fmt: skip
    tile = tl.program_id(0)
    columns = tl.program_id(1) * STEP_COLUMNS + tl.arange(0, STEP_COLUMNS)
    first = tl.load(bounds_ptr + 2 * tile)
    stop = tl.load(bounds_ptr + 2 * tile + 1)
    h_sq = tl.zeros((STEP_ROWS, STEP_COLUMNS), tl.float32)
    g_sq = tl.zeros((STEP_ROWS, STEP_COLUMNS), tl.float32)
    gh_sq = tl.zeros((STEP_ROWS, STEP_COLUMNS), tl.float32)
    gh = tl.zeros((STEP_ROWS, STEP_COLUMNS), tl.float32)
    h_abs = tl.zeros((STEP_ROWS, STEP_COLUMNS), tl.float32)
    ph_sq = tl.zeros((STEP_ROWS, STEP_COLUMNS), tl.float32)
    ph_max = tl.zeros((STEP_ROWS, STEP_COLUMNS), tl.float32)
    for start in range(first, stop, STEP_ROWS):
        rows = start + tl.arange(0, STEP_ROWS)
        is_there = (rows < stop)[:, None] & (columns < width)[None, :]
        where = rows.to(tl.int64)[:, None] * width + columns[None, :]
        h = tl.load(h_ptr + where, mask=is_there, other=0.0).to(tl.float32)
        g = tl.load(grad_ptr + where, mask=is_there, other=0.0).to(tl.float32)
        p = tl.load(p_ptr + rows, mask=rows < stop, other=0.0).to(tl.float32)[:, None]
        ph = tl.abs(p * h)
        h_sq += h * h
        g_sq += g * g
        gh_sq += (g * h) * (g * h)
        gh += g * h
        h_abs += tl.abs(h)
        ph_sq += ph * ph
        ph_max = tl.maximum(ph_max, ph)
    out_ptr += tile.to(tl.int64) * 7 * width + columns
    is_own = columns < width
    tl.store(out_ptr, tl.sum(h_sq, 0), mask=is_own)
    tl.store(out_ptr + width, tl.sum(g_sq, 0), mask=is_own)
    tl.store(out_ptr + 2 * width, tl.sum(gh_sq, 0), mask=is_own)
    tl.store(out_ptr + 3 * width, tl.sum(gh, 0), mask=is_own)
    tl.store(out_ptr + 4 * width, tl.sum(h_abs, 0), mask=is_own)
    tl.store(out_ptr + 5 * width, tl.sum(ph_sq, 0), mask=is_own)
    tl.store(out_ptr + 6 * width, tl.max(ph_max, 0), mask=is_own)
