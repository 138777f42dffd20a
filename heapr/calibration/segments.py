"""The collector's sums over (token, expert) pairs, for the rows of one expert or the segments of all experts.

In: h, dloss/dh, router weights and outputs. Out: one batch's part of each statistic of `LayerStatistics`, in
float32.
Shape letters: D model width, E experts, F atomic experts of an expert, S pairs, sorted by expert or of one
expert.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor

from heapr.model.experts.grouped import Pairs


class Reduction(Protocol):
    """Reduces rows (S, ...) to one result per expert."""

    def sum(self, rows: Tensor) -> Tensor: ...

    def weighted_sum(self, weight_S: Tensor, rows: Tensor) -> Tensor: ...

    def largest(self, rows: Tensor) -> Tensor: ...


class OneExpert:
    """All rows (at least one) belong to one expert; results are (...)."""

    def sum(self, rows: Tensor) -> Tensor:
        return rows.sum(0)

    def weighted_sum(self, weight_S: Tensor, rows: Tensor) -> Tensor:
        return weight_S @ rows

    def largest(self, rows: Tensor) -> Tensor:
        return rows.amax(0)


class Segments:
    """Rows are sorted by expert; results are (E, ...). Does not wait for a device.

    Args:
        offsets: int64 (E+1,), on the device of the rows.
    """

    def __init__(self, offsets: Tensor) -> None:
        self.offsets = offsets

    def sum(self, rows: Tensor) -> Tensor:
        return torch.segment_reduce(rows, "sum", offsets=self.offsets, unsafe=True)

    def weighted_sum(self, weight_S: Tensor, rows: Tensor) -> Tensor:
        if rows.dim() > 1:
            weight_S = weight_S.unsqueeze(1)
        return self.sum(weight_S * rows)

    def largest(self, rows: Tensor) -> Tensor:
        """The largest row, at least 0; 0 for an expert without rows."""
        return torch.segment_reduce(rows, "max", offsets=self.offsets, unsafe=True, initial=0)


def pair_statistics(
    h_SF: Tensor, router_weight_S: Tensor, output_SD: Tensor, grad_SF: Tensor, over: Reduction
) -> dict[str, Tensor]:
    """Every statistic of `LayerStatistics`, by name."""
    norm_S = torch.linalg.vector_norm(output_SD, dim=1, dtype=torch.float32)
    of_experts = expert_statistics(router_weight_S, norm_S, over)
    return of_experts | atomic_statistics(h_SF, router_weight_S, grad_SF, over)


def segment_statistics(pairs: Pairs) -> dict[str, Tensor]:
    """Every statistic of `LayerStatistics` for the experts of a bucket, by name; does not wait for a device.

    One kernel reads activations and gradients once where Triton is installed and they are on a GPU;
    otherwise torch reads them once for each statistic.
    """
    over = Segments(pairs.offsets)
    h_SF, grad_SF, p_S = pairs.h_SF, pairs.grad_SF, pairs.router_weight_S
    of_experts = expert_statistics(p_S, pairs.output_norm_S, over)
    width = h_SF.shape[1]
    if not width:
        return of_experts
    is_on_gpu = h_SF.device.type == "cuda"
    if is_on_gpu and find_spec("triton") is not None:
        from heapr.calibration.kernel import tile_statistics

        return of_experts | tile_statistics(h_SF, grad_SF, p_S, pairs.offsets)
    return of_experts | atomic_statistics(h_SF, p_S, grad_SF, over)


def expert_statistics(router_weight_S: Tensor, output_norm_S: Tensor, over: Reduction) -> dict[str, Tensor]:
    """The statistics of whole experts, by name."""
    p_S = router_weight_S.float()
    return {
        "count_E": over.sum(torch.ones_like(p_S)),
        "router_weight_sum_E": over.sum(p_S),
        "output_norm_sum_E": over.weighted_sum(p_S, output_norm_S),
    }


def atomic_statistics(
    h_SF: Tensor, router_weight_S: Tensor, grad_SF: Tensor, over: Reduction
) -> dict[str, Tensor]:
    """The statistics of atomic experts, by name."""
    h_SF = h_SF.float()
    g_SF = grad_SF.float()
    p_S = router_weight_S.float()
    p_S1 = p_S.unsqueeze(1)
    gh_SF = g_SF * h_SF
    h_sq_SF = h_SF.square()
    h_abs_SF = h_SF.abs()
    return {
        "h_sq_sum_EF": over.sum(h_sq_SF),
        "g_sq_sum_EF": over.sum(g_SF.square()),
        "gh_sq_sum_EF": over.sum(gh_SF.square()),
        "gh_sum_EF": over.sum(gh_SF),
        "h_abs_sum_EF": over.sum(h_abs_SF),
        "ph_sq_sum_EF": over.weighted_sum(p_S.square(), h_sq_SF),
        "ph_abs_max_EF": over.largest(p_S1 * h_abs_SF),
    }
