"""Whole-expert criteria by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from heapr.score.criterion import Criterion
from heapr.score.whole_expert import Frequency, HeaprExpert, Reap
from heapr.types import Granularity
from tests.tiny import layer_statistics, no_weights, statistics_of

# Three experts of two atomic experts: 4 tokens reached the first, 1 the second, none the third.
LAYER = replace(
    layer_statistics(
        [4, 1, 0],
        h_sq_sum=[[8.0, 2.0], [6.0, 0.0], [0.0, 0.0]],
        g_sq_sum=[[4.0, 12.0], [2.0, 5.0], [0.0, 0.0]],
    ),
    output_norm_sum_E=torch.tensor([10.0, 3.0, 0.0], dtype=torch.float64),
)


@pytest.mark.parametrize(
    ("criterion", "expected"),
    [
        (Reap(), [10 / 4, 3 / 1, -1]),
        (Frequency(), [4, 1, -1]),
        (HeaprExpert(), [0.5 * (8 / 4) * (4 / 4) + 0.5 * (2 / 4) * (12 / 4), 0.5 * 6 * 2 + 0, -1]),
    ],
)
def test_hand_computed(criterion: Criterion, expected: list[float]) -> None:
    scores = criterion(statistics_of({7: LAYER}), no_weights)
    assert scores.layers[7].tolist() == [[score, score] for score in expected]
    assert criterion.granularity is Granularity.EXPERT
