"""Activation criteria by hand."""

from __future__ import annotations

import pytest
import torch

from heapr.errors import ConfigError
from heapr.plugins import build
from heapr.score.activation import Activation, Camera
from heapr.types import ExpertWeights
from tests.tiny import layer_statistics, statistics_of

# Two experts of two atomic experts: 4 tokens reached the first, none the second. ||w_k||^2 is 25 and 4.
WEIGHTS = ExpertWeights(
    gate_EFD=None, up_EFD=torch.ones(2, 2, 2), down_EDF=torch.tensor([[[3.0, 0.0], [4.0, -2.0]]] * 2)
)


def test_activation_is_mean_energy_times_squared_norm() -> None:
    statistics = statistics_of({7: layer_statistics([4, 0], h_sq_sum=[[8.0, 2.0], [0.0, 0.0]])})
    assert Activation()(statistics, {7: WEIGHTS}.__getitem__).layers[7].tolist() == [
        [8 / 4 * 25, 2 / 4 * 4],
        [-1, -1],
    ]


@pytest.mark.parametrize(
    ("alpha", "expected"), [(0.0, [10 * 25, 3 * 4]), (1.0, [9 * 25, 4]), (0.25, [9.75 * 25, 2.5 * 4])]
)
def test_camera_lies_between_sum_and_maximum(alpha: float, expected: list[float]) -> None:
    layer = layer_statistics([4, 0], ph_sq_sum=[[10.0, 3.0], [0.0, 0.0]], ph_abs_max=[[3.0, 1.0], [0.0, 0.0]])
    scores = Camera(alpha=alpha)(statistics_of({7: layer}), {7: WEIGHTS}.__getitem__)
    assert scores.layers[7].tolist() == [expected, [-1, -1]]


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_camera_refuses_weights_outside_of_0_and_1(alpha: float) -> None:
    with pytest.raises(ConfigError, match="score.alpha=.*; give a number of at least 0 and of at most 1"):
        build({"_target_": "heapr.score.activation.Camera", "alpha": alpha}, "score")
