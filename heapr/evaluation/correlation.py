"""Correlation of two vectors: Pearson's of the values, Spearman's of the ranks."""

from __future__ import annotations

import torch
from torch import Tensor


def pearson(a: Tensor, b: Tensor) -> float | None:
    """Pearson's correlation, in [-1, 1], of two float64 vectors of equal length. None if one is constant."""
    assert a.dim() == 1 and a.shape == b.shape
    if _is_constant(a) or _is_constant(b):
        return None
    pair = torch.stack([a, b]).double()
    correlation = torch.corrcoef(pair)[0, 1]
    return float(correlation.clamp(-1, 1))


def spearman(a: Tensor, b: Tensor) -> float | None:
    """Spearman's rank correlation, which is Pearson's of the ranks. None if one vector is constant."""
    return pearson(ranks(a), ranks(b))


def ranks(values: Tensor) -> Tensor:
    """Float64 position of each value in the sorted vector, counted from 1.

    Equal values share the mean of their positions.
    """
    _, group, counts = torch.unique(values, return_inverse=True, return_counts=True)
    num_equal = counts.double()
    last = counts.cumsum(0).double()
    mean: Tensor = last - (num_equal - 1) / 2
    return mean[group]


def _is_constant(values: Tensor) -> bool:
    is_first = values == values[0]
    return bool(is_first.all())
