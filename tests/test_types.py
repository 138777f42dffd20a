"""Containers: round trips through their tensors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from heapr.calibration.collector import collect
from heapr.model.moe import MoEModel
from heapr.types import Plan, Scores, Statistics, TokenWindows


def test_statistics_round_trip_under_their_contract_names(model: MoEModel, ids_NW: Tensor) -> None:
    statistics = collect(model, [ids_NW])
    tensors = statistics.to_tensors()
    assert tensors["layers.1.h_sq_sum"].shape == (4, 8)
    assert tensors["layers.0.count"].shape == (4,)
    back = Statistics.from_tensors(tensors)
    assert (back.num_tokens, back.num_predicted_tokens, back.loss_sum) == (96, 88, statistics.loss_sum)
    for index, layer in statistics.layers.items():
        assert all(torch.equal(tensor, getattr(back.layers[index], name)) for name, tensor in layer.items())


def test_scores_plans_and_tokens_round_trip() -> None:
    scores = Scores(layers={11: torch.rand(2, 3), 2: torch.rand(2, 3)})
    assert list(Scores.from_tensors(scores.to_tensors()).layers) == [2, 11]  # by number, not by text
    plan = Plan(layers={0: torch.tensor([[True, False]])})
    assert Plan.from_tensors(plan.to_tensors()).layers[0].tolist() == [[True, False]]
    tokens = TokenWindows(ids_NW=torch.arange(6).view(2, 3))
    assert torch.equal(TokenWindows.from_tensors(tokens.to_tensors()).ids_NW, tokens.ids_NW)


def test_wrong_shapes_and_types_are_caught() -> None:
    with pytest.raises(AssertionError):
        Scores(layers={0: torch.rand(3)})
    with pytest.raises(AssertionError):
        Scores(layers={0: torch.rand(2, 3, dtype=torch.float64)})
    with pytest.raises(AssertionError, match="layer 0 would lose all"):
        Plan(layers={0: torch.zeros(2, 3, dtype=torch.bool)})
