"""Allocation: exact counts, scopes, ties, and layers that never become empty."""

from __future__ import annotations

import pytest
import torch

from heapr.errors import ConfigError
from heapr.pruning.allocation import allocate, numbers_removed
from heapr.schema import SCOPES
from heapr.types import Scores


def random_scores(num_layers: int = 3, num_experts: int = 5, width: int = 7) -> Scores:
    generator = torch.Generator().manual_seed(0)
    return Scores(layers={2 * index: torch.rand(num_experts, width, generator=generator) for index in range(num_layers)})


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("ratio", [0.0, 0.01, 0.2, 0.25, 1 / 3, 0.5, 0.6000000000000001, 0.9])
def test_exactly_the_requested_number_is_removed(scope: str, ratio: float) -> None:
    plan = allocate(random_scores(), ratio=ratio, scope=scope)
    assert plan.num_removed == int(ratio * 105 + 0.5)
    assert list(plan.layers) == [0, 2, 4]


def test_groups_lose_the_same_share() -> None:
    per_layer = allocate(random_scores(), ratio=0.3, scope="layer")
    assert {int((~kept).sum()) for kept in per_layer.layers.values()} <= {10, 11}  # 0.3 * 35 = 10.5
    per_expert = allocate(random_scores(), ratio=0.3, scope="expert")
    assert {int(n) for kept in per_expert.layers.values() for n in (~kept).sum(1)} <= {2, 3}  # 0.3 * 7 = 2.1


def test_the_lowest_scores_go() -> None:
    scores = Scores(layers={0: torch.tensor([[1.0, 9.0], [3.0, 8.0]]), 1: torch.tensor([[2.0, 7.0], [4.0, 5.0]])})
    plan = allocate(scores, ratio=0.5, scope="global")
    assert plan.layers[0].tolist() == [[False, True], [False, True]]
    assert plan.layers[1].tolist() == [[False, True], [False, True]]
    per_layer = allocate(Scores(layers={0: scores.layers[0], 1: 100 * scores.layers[1]}), ratio=0.5, scope="layer")
    assert per_layer.layers[1].tolist() == [[False, True], [False, True]]
    globally = allocate(Scores(layers={0: scores.layers[0], 1: 100 * scores.layers[1]}), ratio=0.375, scope="global")
    assert globally.layers[0].tolist() == [[False, True], [False, False]]
    assert globally.layers[1].all()


def test_ties_are_broken_by_position() -> None:
    plan = allocate(Scores(layers={0: torch.ones(2, 4), 1: torch.ones(2, 4)}), ratio=0.25, scope="global")
    # the first of equals is the layer's best and stays; the next four go
    assert plan.layers[0].tolist() == [[True, False, False, False], [False, True, True, True]]
    assert plan.layers[1].all()


def test_no_layer_loses_all_its_experts() -> None:
    scores = Scores(layers={0: torch.full((2, 4), 0.001), 1: torch.ones(2, 4)})
    plan = allocate(scores, ratio=0.5, scope="global")
    assert plan.num_removed == 8
    assert plan.layers[0].sum() == 1
    with pytest.raises(ConfigError, match="would remove every atomic expert of a layer"):
        allocate(scores, ratio=0.95, scope="global")


def test_unrouted_experts_go_first() -> None:
    scores = Scores(layers={0: torch.tensor([[0.0, 1e-9], [-1.0, -1.0]]), 1: torch.rand(2, 2)})
    assert allocate(scores, ratio=0.25, scope="global").layers[0].tolist() == [[True, True], [False, False]]


@pytest.mark.parametrize("scope", SCOPES)
def test_numbers_removed_refuses_exactly_what_would_empty_a_layer(scope: str) -> None:
    assert sum(numbers_removed([32, 32], ratio=0.96, scope=scope)) == 61
    with pytest.raises(ConfigError, match="would remove every atomic expert of a layer"):
        numbers_removed([32, 32], ratio=0.99, scope=scope)
