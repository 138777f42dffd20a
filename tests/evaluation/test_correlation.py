"""Correlations against ranks and sums computed by hand."""

from __future__ import annotations

import pytest
import torch

from heapr.evaluation.correlation import pearson, ranks, spearman


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_equal_values_share_the_mean_of_their_ranks() -> None:
    assert ranks(vector(10, 30, 20, 30)).tolist() == [1, 3.5, 2, 3.5]
    assert ranks(vector(5, 5, 5)).tolist() == [2, 2, 2]


def test_pearson_by_hand() -> None:
    # deviations (-1, 0, 1) and (-2, 1, 1): 3 / sqrt(2 * 6)
    assert pearson(vector(1, 2, 3), vector(0, 3, 3)) == pytest.approx(3 / 12**0.5)
    assert pearson(vector(1, 2, 3), vector(-10, -20, -30)) == pytest.approx(-1)


def test_spearman_with_ties_by_hand() -> None:
    # ranks (1, 2.5, 2.5, 4) and (1, 3, 2, 4): deviations (-1.5, 0, 0, 1.5) and (-1.5, 0.5, -0.5, 1.5): 4.5 /
    # sqrt(4.5 * 5)
    assert spearman(vector(0, 7, 7, 100), vector(1, 3, 2, 4)) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    assert spearman(vector(1, 2, 3), vector(1, 10, 1e6)) == pytest.approx(1)


def test_a_constant_correlates_with_nothing() -> None:
    assert pearson(vector(1, 1, 1), vector(1, 2, 3)) is None
    assert spearman(vector(1, 2, 3), vector(4, 4, 4)) is None
