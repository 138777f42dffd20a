"""Allocation: exact counts, scopes, ties, and layers that never become empty."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch

from heapr.errors import ConfigError
from heapr.pruning.allocation import allocate
from heapr.pruning.allocation_report import report_allocation
from heapr.pruning.budget import Budget, the_width
from heapr.pruning.rounding import near_widths
from heapr.schema import SCOPES
from heapr.types import Plan, Scores


def plan_of(
    scores: Scores, *, ratio: float, scope: str, experts_per_token: int = 1, **settings: object
) -> Plan:
    """Of experts that all have the width of the scores."""
    widths = {index: [scores_EF.shape[1]] * len(scores_EF) for index, scores_EF in scores.layers.items()}
    budget = Budget(ratio=ratio, scope=scope, experts_per_token=experts_per_token, **settings)
    budget.check(widths)
    return allocate(scores, widths, budget)


def random_scores(num_layers: int = 3, num_experts: int = 5, width: int = 7) -> Scores:
    generator = torch.Generator().manual_seed(0)
    return Scores(
        layers={2 * index: torch.rand(num_experts, width, generator=generator) for index in range(num_layers)}
    )


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("ratio", [0.0, 0.01, 0.2, 0.25, 1 / 3, 0.5, 0.6000000000000001, 0.9])
def test_exactly_the_requested_number_is_removed(scope: str, ratio: float) -> None:
    plan = plan_of(random_scores(), ratio=ratio, scope=scope)
    assert plan.num_kept == 105 - int(ratio * 105 + 0.5)
    assert list(plan.layers) == [0, 2, 4]


def test_groups_lose_the_same_share() -> None:
    per_layer = plan_of(random_scores(), ratio=0.3, scope="layer")
    assert {int((~kept).sum()) for kept in per_layer.layers.values()} <= {10, 11}  # 0.3 * 35 = 10.5
    per_expert = plan_of(random_scores(), ratio=0.3, scope="expert")
    assert {int(n) for kept in per_expert.layers.values() for n in (~kept).sum(1)} <= {2, 3}  # 0.3 * 7 = 2.1


def test_the_lowest_scores_go() -> None:
    scores = Scores(
        layers={0: torch.tensor([[1.0, 9.0], [3.0, 8.0]]), 1: torch.tensor([[2.0, 7.0], [4.0, 5.0]])}
    )
    plan = plan_of(scores, ratio=0.5, scope="global")
    assert plan.layers[0].tolist() == [[False, True], [False, True]]
    assert plan.layers[1].tolist() == [[False, True], [False, True]]
    per_layer = plan_of(
        Scores(layers={0: scores.layers[0], 1: 100 * scores.layers[1]}), ratio=0.5, scope="layer"
    )
    assert per_layer.layers[1].tolist() == [[False, True], [False, True]]
    globally = plan_of(
        Scores(layers={0: scores.layers[0], 1: 100 * scores.layers[1]}), ratio=0.375, scope="global"
    )
    assert globally.layers[0].tolist() == [[False, True], [False, False]]
    assert globally.layers[1].all()


def test_no_other_plan_keeps_a_higher_score() -> None:
    """Against every choice of 5 of 12 atomic experts that leaves each layer one."""
    scores = random_scores(num_layers=2, num_experts=2, width=3)
    scores.layers[0][:] *= 0.1
    flat_S = torch.cat([scores_EF.flatten() for scores_EF in scores.layers.values()])
    choices = [kept for kept in combinations(range(12), 7) if min(kept) < 6 <= max(kept)]
    highest = max(float(flat_S[list(kept)].double().sum()) for kept in choices)
    plan = plan_of(scores, ratio=5 / 12, scope="global")
    kept_S = torch.cat([kept_EF.flatten() for kept_EF in plan.layers.values()])
    assert int(kept_S.sum()) == 7
    assert float(flat_S[kept_S].double().sum()) == pytest.approx(highest)


def test_ties_are_broken_by_position() -> None:
    plan = plan_of(Scores(layers={0: torch.ones(2, 4), 1: torch.ones(2, 4)}), ratio=0.25, scope="global")
    # the first of equals is the layer's best and stays; the next four go
    assert plan.layers[0].tolist() == [[True, False, False, False], [False, True, True, True]]
    assert plan.layers[1].all()


def test_no_layer_loses_all_its_experts() -> None:
    scores = Scores(layers={0: torch.full((2, 4), 0.001), 1: torch.ones(2, 4)})
    plan = plan_of(scores, ratio=0.5, scope="global")
    assert plan.num_kept == 8
    assert plan.layers[0].sum() == 1
    with pytest.raises(
        ConfigError, match="would leave a layer fewer experts than the 1 that every token is routed to"
    ):
        plan_of(scores, ratio=0.95, scope="global")


def test_unrouted_experts_go_first() -> None:
    scores = Scores(layers={0: torch.tensor([[0.0, 1e-9], [-1.0, -1.0]]), 1: torch.rand(2, 2)})
    assert plan_of(scores, ratio=0.25, scope="global").layers[0].tolist() == [[True, True], [False, False]]


@pytest.mark.parametrize("scope", SCOPES)
def test_a_ratio_is_refused_exactly_where_top_k_would_lack_experts(scope: str) -> None:
    budget, widths = Budget(ratio=0.87, scope=scope, experts_per_token=4), {0: [8] * 4, 1: [8] * 4}
    assert sum(budget.numbers_removed(widths)) == 56  # 28 of each 32, or 56 of all 64
    with pytest.raises(
        ConfigError, match="would leave a layer fewer experts than the 4 that every token is routed to"
    ):
        Budget(ratio=0.9, scope=scope, experts_per_token=4).numbers_removed(widths)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("experts_per_token", [1, 3, 5])
def test_every_layer_keeps_as_many_experts_as_a_token_needs(scope: str, experts_per_token: int) -> None:
    scores = random_scores()
    scores.layers[2][1:] *= 1e-6  # globally, layer 2 would keep one expert
    plan = plan_of(scores, ratio=0.8, scope=scope, experts_per_token=experts_per_token)
    assert plan.num_kept == 21
    assert all(int(kept_EF.any(dim=1).sum()) >= experts_per_token for kept_EF in plan.layers.values())


def ragged_scores() -> tuple[Scores, dict[int, list[int]]]:
    """Scores of experts that were pruned before; beyond their widths lie the highest numbers, which must not
    count."""
    widths = {0: [7, 3, 0, 5, 7], 2: [1, 6, 2, 7, 4], 4: [7, 7, 7, 7, 7]}
    scores = random_scores()
    for index, width_E in widths.items():
        for expert, width in enumerate(width_E):
            scores.layers[index][expert, width:] = 99.0
    return scores, widths


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5])
def test_ragged_experts_lose_exactly_the_requested_number_again(scope: str, ratio: float) -> None:
    scores, widths = ragged_scores()
    plan = allocate(scores, widths, Budget(ratio=ratio, scope=scope, experts_per_token=2))
    total = sum(map(sum, widths.values()))
    assert plan.num_kept == total - int(ratio * total + 0.5)
    for index, width_E in widths.items():
        for kept_F, width in zip(plan.layers[index], width_E, strict=True):
            assert not kept_F[width:].any()
            if scope == "expert":
                assert abs(int(kept_F.sum()) - width * (1 - ratio)) <= 1


@pytest.mark.parametrize("multiple", [8, 16, 32, 64])
@pytest.mark.parametrize("scope", SCOPES)
def test_widths_are_rounded_to_multiples_and_the_total_stays(multiple: int, scope: str) -> None:
    generator = torch.Generator().manual_seed(1)
    scores = Scores(
        layers={index: torch.rand(6, 128, generator=generator) ** (index + 1) for index in range(3)}
    )
    exact = plan_of(scores, ratio=0.4, scope=scope, experts_per_token=2)
    plan = plan_of(scores, ratio=0.4, scope=scope, experts_per_token=2, width_multiple=multiple)
    for index, kept_EF in plan.layers.items():
        assert not (kept_EF.sum(dim=1) % multiple).any()
        assert abs(int(kept_EF.sum()) - int(exact.layers[index].sum())) <= multiple
        assert (kept_EF.sum(dim=1) - exact.layers[index].sum(dim=1)).abs().max() < multiple
        # The best of each expert are kept.
        for kept_F, scores_F in zip(kept_EF, scores.layers[index], strict=True):
            assert scores_F.sort().values[128 - int(kept_F.sum()) :].equal(scores_F[kept_F].sort().values)


def test_rounding_up_goes_where_the_scores_are() -> None:
    """Widths 3 and 5 become 0 and 8 or 8 and 0 by the sum of the next eight, which a few high scores
    decide."""
    scores = torch.full((2, 16), 0.1)
    scores[0, :3] = 5.0
    scores[1, :5] = 4.0
    plan = plan_of(Scores(layers={0: scores}), ratio=0.75, scope="layer", width_multiple=8)
    assert plan.layers[0].sum(dim=1).tolist() == [0, 8]
    scores[0, :3] = 9.0
    plan = plan_of(Scores(layers={0: scores}), ratio=0.75, scope="layer", width_multiple=8)
    assert plan.layers[0].sum(dim=1).tolist() == [8, 0]


def test_rounding_leaves_as_many_experts_as_a_token_needs() -> None:
    scores = torch.full((2, 16), 0.1)
    scores[0, :6] = scores[1, :2] = 1.0
    plan = plan_of(
        Scores(layers={0: scores}), ratio=0.75, scope="layer", experts_per_token=2, width_multiple=8
    )
    assert plan.layers[0].sum(dim=1).tolist() == [8, 8]


@pytest.mark.parametrize(
    ("width", "ratio", "multiple", "near"),
    [
        (32, 0.3, 1, [22, 23]), (32, 0.3, 8, [24, 16]), (32, 0.5, 16, [16]), (32, 0.99, 8, [8]), (64, 0.3, 8, [48, 40]),
        (64, 0.0, 8, [64]), (64, 0.05, 8, [64, 56]), (64, 0.4375, 8, [40, 32]), (768, 0.3, 8, [536, 544]), (768, 0.999, 8, [8]),
        (12, 0.05, 8, [12, 8]), (12, 0.3, 8, [8, 12]), (6, 0.5, 8, [6]), (8, 0.5, 8, [8]), (80, 0.9, 8, [8]), (64, 0.2, 8, [48, 56]),
    ],
)  # fmt: skip
def test_widths_near_what_a_ratio_asks_for(width: int, ratio: float, multiple: int, near: list[int]) -> None:
    assert near_widths(width, ratio, multiple) == near


def test_uniform_widths() -> None:
    scores = random_scores(width=32)
    plan = plan_of(scores, ratio=0.3, scope="expert", uniform_width=24)
    assert all((kept_EF.sum(dim=1) == 24).all() for kept_EF in plan.layers.values())
    for index, kept_EF in plan.layers.items():
        lowest_E = scores.layers[index].masked_fill(~kept_EF, math.inf).amin(dim=1)
        highest_E = scores.layers[index].masked_fill(kept_EF, -math.inf).amax(dim=1)
        assert (lowest_E > highest_E).all()


def test_what_cannot_be_rounded_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="width_multiple=16, but experts of this model have 7 atomic experts.*for example 1"
    ):
        plan_of(random_scores(), ratio=0.5, scope="global", width_multiple=16)
    _, widths = ragged_scores()
    with pytest.raises(ConfigError, match="needs experts of one width, this model has 8"):
        the_width(widths)


def test_the_report_says_what_rounding_cost() -> None:
    scores = torch.full((2, 16), 0.1)
    scores[0, :3] = 5.0
    scores[1, :5] = 4.0
    widths, budget = {0: [16, 16]}, Budget(ratio=0.75, scope="layer", experts_per_token=1, width_multiple=8)
    report = report_allocation(
        allocate(Scores(layers={0: scores}), widths, budget), Scores(layers={0: scores}), widths, budget
    )
    assert report["atomic_experts_removed"] == 24 and report["atomic_experts_exchanged"] == 3
    assert report["kept_score_without_rounding"] == pytest.approx(3 * 5 + 5 * 4)
    assert report["kept_score"] == pytest.approx(5 * 4 + 3 * 0.1)
    assert "3 of which would be removed without rounding" in report["summary"][1]


def test_a_total_that_the_top_k_keeps_from_being_reached_is_said_with_its_number() -> None:
    """Four experts of 2 are to stay of 8 x 8: each becomes 8 wide, which leaves 32 in place of 8."""
    scores, widths = Scores(layers={0: random_scores(1, 8, 8).layers[0]}), {0: [8] * 8}
    budget = Budget(ratio=0.875, scope="global", experts_per_token=4, width_multiple=8)
    plan = allocate(scores, widths, budget)
    assert plan.num_kept == 32
    assert report_allocation(plan, scores, widths, budget)["not_reached"] == [
        "32 atomic experts are removed instead of 56: the rest must stay, because every token is routed to 4"
        " experts and as many of each layer keep a width of at least 8"
    ]
    exact = Budget(ratio=0.875, scope="global", experts_per_token=4)
    assert report_allocation(allocate(scores, widths, exact), scores, widths, exact)["not_reached"] == []
