"""How two lists of numbers go together: Pearson's correlation of the values, Spearman's of their ranks."""

from __future__ import annotations

import torch
from torch import Tensor


def pearson(a: Tensor, b: Tensor) -> float | None:
    """Correlation of two float64 vectors of equal length, in [-1, 1]; none where one of them is constant."""
    assert a.dim() == 1 and a.shape == b.shape
    if bool((a == a[0]).all()) or bool((b == b[0]).all()):
        return None
    return float(torch.corrcoef(torch.stack([a, b]).double())[0, 1].clamp(-1, 1))


def spearman(a: Tensor, b: Tensor) -> float | None:
    """Pearson's correlation of the ranks; none where one of the vectors is constant."""
    return pearson(ranks(a), ranks(b))


def ranks(values: Tensor) -> Tensor:
    """Position of each value in the sorted vector, from 1, float64; equal values share the mean of their
    positions."""
    _, group, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    mean: Tensor = last - (counts.double() - 1) / 2
    return mean[group]
