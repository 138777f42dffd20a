"""Widths and routing frequencies, by hand."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from heapr.evaluation.routing import Routing
from heapr.types import Plan
from tests.evaluation.material import only
from tests.tiny import layer_statistics, statistics_of

KEPT_EF = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)


def routing(causal_lm: PreTrainedModel, layers: dict[int, tuple[list[float], torch.Tensor]]):
    layers_statistics = {
        i: layer_statistics(count, h_sq_sum=[[0.0] * 4] * len(count)) for i, (count, _) in layers.items()
    }
    material = only(
        statistics=statistics_of(layers_statistics, num_predicted_tokens=10),
        widths={index: [4, 4, 4] for index in layers},
        plan=Plan(layers={index: kept_EF for index, (_, kept_EF) in layers.items()}),
    )
    return Routing()(material)


def test_lists_and_correlation_by_hand(causal_lm: PreTrainedModel) -> None:
    found = routing(causal_lm, {1: ([9, 9, 2], KEPT_EF), 5: ([1, 5, 4], torch.ones(3, 4, dtype=torch.bool))})
    first, second = found.details["layers"]
    assert first == {
        "layer": 1,
        "layer_kept_ratio": 0.5,
        "widths_before": [4, 4, 4],
        "widths": [4, 2, 0],
        "kept_ratio": [1.0, 0.5, 0.0],
        "routing_frequency": [0.9, 0.9, 0.2],
    }
    assert (
        second["layer"] == 5
        and second["widths"] == [4, 4, 4]
        and second["routing_frequency"] == [0.1, 0.5, 0.4]
    )
    # ranks of frequency (5.5, 5.5, 2, 1, 4, 3), of share kept (4.5, 2, 1, 4.5, 4.5, 4.5), both of mean 3.5
    covariance = 2 * 1 + 2 * -1.5 + -1.5 * -2.5 + 1 * (-2.5 + 0.5 - 0.5)
    assert found.metrics["routing/spearman"] == pytest.approx(covariance / (17 * (4 + 2.25 + 6.25)) ** 0.5)
    assert found.metrics["routing/empty_experts"] == 1
    assert (found.metrics["routing/kept_ratio_lowest"], found.metrics["routing/kept_ratio_highest"]) == (
        0.5,
        1,
    )


def test_where_nothing_is_removed_there_is_no_correlation(causal_lm: PreTrainedModel) -> None:
    found = routing(causal_lm, {0: ([1, 2, 3], torch.ones(3, 4, dtype=torch.bool))})
    assert "routing/spearman" not in found.metrics and found.metrics["routing/kept_ratio_lowest"] == 1
