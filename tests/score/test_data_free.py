"""Data-free criteria by hand."""

from __future__ import annotations

import torch

from heapr.score.data_free import Magnitude, Random
from heapr.types import ExpertWeights
from tests.tiny import layer_statistics, no_weights, statistics_of


def test_magnitude_is_the_norm_of_all_three_slices() -> None:
    weights = ExpertWeights(
        gate_EFD=torch.tensor([[[1.0, 2.0], [0.0, 0.0]]]),
        up_EFD=torch.tensor([[[2.0, 0.0], [3.0, 0.0]]]),
        down_EDF=torch.tensor([[[4.0, 0.0], [0.0, -4.0]]]),
    )
    statistics = statistics_of({3: layer_statistics([1], h_sq_sum=[[1.0, 1.0]])})
    assert Magnitude()(statistics, {3: weights}.__getitem__).layers[3].tolist() == [[5.0, 5.0]]


def test_random_is_seeded() -> None:
    layer = layer_statistics([1, 1], h_sq_sum=[[1.0] * 50, [1.0] * 50])
    statistics = statistics_of({0: layer, 1: layer})
    first, again, other = (Random(seed)(statistics, no_weights).layers for seed in (5, 5, 6))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[0], first[1])
