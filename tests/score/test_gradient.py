"""Gradient criteria by hand."""

from __future__ import annotations

import pytest
import torch

from heapr.score.criterion import predicted_increase
from heapr.score.data_free import Random
from heapr.score.gradient import Fisher, Heapr, HeaprSum, Taylor
from tests.tiny import layer_statistics, no_weights, statistics_of

# Two experts of two atomic experts: 4 tokens reached the first, none the second. N = 10 predicted tokens.
LAYER = {
    "h_sq_sum": [[8.0, 2.0], [0.0, 0.0]],
    "g_sq_sum": [[4.0, 12.0], [0.0, 0.0]],
    "gh_sq_sum": [[3.0, 5.0], [0.0, 0.0]],
}


@pytest.mark.parametrize(
    ("criterion", "expected"),
    [
        (Heapr(), [0.5 * (8 / 4) * (4 / 4), 0.5 * (2 / 4) * (12 / 4)]),
        (HeaprSum(), [4 / 20 * (8 / 4) * (4 / 4), 4 / 20 * (2 / 4) * (12 / 4)]),
        (Fisher(), [3 / 20, 5 / 20]),
    ],
)
def test_hand_computed(criterion: Heapr | HeaprSum | Fisher, expected: list[float]) -> None:
    statistics = statistics_of({7: layer_statistics([4, 0], **LAYER)}, num_predicted_tokens=10)
    scores = criterion(statistics, no_weights)
    assert scores.layers.keys() == {7}
    torch.testing.assert_close(scores.layers[7][0], torch.tensor(expected))
    assert scores.layers[7][1].tolist() == [-1, -1]  # unrouted: below every other


def test_heapr_sum_is_heapr_times_routed_tokens_over_predicted_tokens() -> None:
    statistics = statistics_of(
        {0: layer_statistics([4, 2], **{**LAYER, "h_sq_sum": [[8.0, 2.0], [1.0, 3.0]]})},
        num_predicted_tokens=10,
    )
    heapr, heapr_sum = Heapr()(statistics, no_weights).layers[0], HeaprSum()(statistics, no_weights).layers[0]
    torch.testing.assert_close(heapr_sum, heapr * torch.tensor([[4.0], [2.0]]) / 10)


def test_predicted_increase_by_hand() -> None:
    """A score per routed token times n/N; an unrouted expert predicts nothing; an order predicts nothing at
    all."""
    layer = layer_statistics([3, 0], h_sq_sum=[[6.0, 12.0], [0.0, 0.0]], g_sq_sum=[[3.0, 9.0], [0.0, 0.0]])
    statistics = statistics_of({4: layer}, num_predicted_tokens=12)
    scores = Heapr()(statistics, no_weights)
    assert scores.layers[4].tolist() == [[1, 6], [-1, -1]]
    predicted = predicted_increase(scores, Heapr.unit, statistics)
    assert predicted is not None and predicted[4].tolist() == [[0.25, 1.5], [0, 0]]
    alike = predicted_increase(HeaprSum()(statistics, no_weights), HeaprSum.unit, statistics)
    assert alike is not None and alike[4].tolist() == predicted[4].tolist()
    assert predicted_increase(scores, Random.unit, statistics) is None


def test_taylor_is_the_size_of_the_summed_products() -> None:
    statistics = statistics_of(
        {7: layer_statistics([4, 0], gh_sum=[[-3.0, 2.0], [0.0, 0.0]])}, num_predicted_tokens=10
    )
    assert Taylor()(statistics, no_weights).layers[7].tolist() == [[3, 2], [-1, -1]]
