"""A higher ratio never brings anything back: over random scores, widths, costs and ratios, for every way to
allocate."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from heapr.errors import ConfigError
from heapr.pruning.allocation import allocate
from heapr.pruning.budget import Budget, Costs, Widths
from heapr.pruning.rounding import equal_shares
from heapr.types import Granularity, Plan, Scores

WHOLE = {"granularity": Granularity.EXPERT}
WAYS: dict[str, dict[str, Any]] = {
    "global": {"scope": "global"},
    "layer": {"scope": "layer"},
    "expert": {"scope": "expert"},
    "whole experts, global": {"scope": "global", **WHOLE},
    "whole experts, layer": {"scope": "layer", **WHOLE},
    "flops, global": {"scope": "global", "unit": "flops"},
    "flops, layer": {"scope": "layer", "unit": "flops"},
    "flops, global, multiples": {"scope": "global", "unit": "flops", "width_multiple": 4},
    "flops, layer, multiples": {"scope": "layer", "unit": "flops", "width_multiple": 4},
    "protected, global": {"scope": "global", "protected_layers": (2,)},
    "protected, layer": {"scope": "layer", "protected_layers": (2,)},
    "protected, global, flops": {"scope": "global", "unit": "flops", "protected_layers": (2,)},
}


def random_case(seed: int) -> tuple[Scores, dict[int, list[int]], Costs]:
    """Layers of unequal sizes, experts of unequal widths (multiples of 4, some of none), ties, experts that
    no token reached."""
    generator, chooser = torch.Generator().manual_seed(seed), random.Random(seed)
    layers, widths, costs = {}, {}, {}
    for index in (0, 2, 3, 7):
        num_experts, width = chooser.randint(4, 9), 4 * chooser.randint(2, 6)
        scores_EF = torch.rand(num_experts, width, generator=generator) ** chooser.choice([1, 6])
        scores_EF = (8 * scores_EF).round() / 8 if chooser.random() < 0.3 else scores_EF
        scores_EF[chooser.randrange(num_experts)] = -1.0
        is_whole = chooser.random() < 0.3
        widths[index] = [
            width if is_whole else 4 * chooser.randint(0, width // 4) for _ in range(num_experts)
        ]
        widths[index][:3] = [width] * 3
        costs[index] = torch.randint(0, 50, (num_experts,), generator=generator).double()
        costs[index][0] = 50
        layers[index] = scores_EF
    return Scores(layers=layers), widths, costs


def plans_by_ratio(scores: Scores, widths: Widths, costs: Costs, way: dict[str, Any]) -> dict[float, Plan]:
    """Whatever is not refused, from nothing up."""
    settings = {"ratio": 0.0, "experts_per_token": 2, **way}
    if settings.get("granularity") is Granularity.EXPERT:  # such a score is the expert's
        scores = Scores(
            layers={
                index: scores_EF[:, :1].expand_as(scores_EF).contiguous()
                for index, scores_EF in scores.layers.items()
            }
        )
    chooser, plans = random.Random(0), {}
    for ratio in sorted([0.0, *(chooser.random() for _ in range(40))]):
        budget = replace(Budget(**settings), ratio=ratio)
        try:
            budget.check(widths)
            plans[ratio] = allocate(
                scores, widths, budget, None if budget.unit == "atomic_experts" else costs
            )
        except ConfigError:
            continue
    return plans


@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize("seed", range(6))
def test_what_a_ratio_removes_every_higher_one_removes_too(way: str, seed: int) -> None:
    scores, widths, costs = random_case(seed)
    plans = plans_by_ratio(scores, widths, costs, WAYS[way])
    assert len(plans) > 5
    earlier = None
    for ratio, plan in plans.items():
        for index, kept_EF in plan.layers.items():
            exists_EF = torch.arange(kept_EF.shape[1]) < torch.tensor(widths[index]).unsqueeze(1)
            assert not (kept_EF & ~exists_EF).any()
            assert earlier is None or not (kept_EF & ~earlier.layers[index]).any(), (ratio, index)
        earlier = plan


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("scope", ["layer", "expert"])
def test_there_is_one_share_that_all_lose(seed: int, scope: str) -> None:
    """Rounded to the nearest number of atomic experts, of layers and (scope expert) of experts; the total is
    exact."""
    scores, widths, _ = random_case(seed)
    total = sum(map(sum, widths.values()))
    for ratio in (0.1, 0.27, 0.5, 0.63):
        plan = allocate(scores, widths, Budget(ratio=ratio, scope=scope, experts_per_token=2))
        assert total - plan.num_kept == int(ratio * total + 0.5)
        groups = {index: [sum(width_E)] for index, width_E in widths.items()}
        lost = {index: [groups[index][0] - int(plan.layers[index].sum())] for index in groups}
        assert has_one_share(
            [size for sizes in groups.values() for size in sizes], [n for ns in lost.values() for n in ns]
        )
        if scope == "expert":
            for index, width_E in widths.items():
                gone_E = (torch.tensor(width_E) - plan.layers[index].sum(dim=1)).tolist()
                assert has_one_share(width_E, gone_E)


def has_one_share(sizes: list[int], gone: list[int]) -> bool:
    """Whether some t has |t s - g| <= 1/2 for all."""
    lowest = max((g - 0.5) / s for s, g in zip(sizes, gone, strict=True) if s)
    highest = min((g + 0.5) / s for s, g in zip(sizes, gone, strict=True) if s)
    return lowest <= highest + 1e-12


def test_equal_shares_by_hand() -> None:
    assert [equal_shares([4, 4, 4], number) for number in range(5)] == [
        [0, 0, 0],
        [1, 0, 0],
        [1, 1, 0],
        [1, 1, 1],
        [2, 1, 1],
    ]
    assert equal_shares([10, 0, 2], 6) == [5, 0, 1] and equal_shares([10, 0, 2], 12) == [10, 0, 2]
    # Shares 1/20, 3/20, 1/4 (of both: the first group's), 1/4.
    assert equal_shares([10, 0, 2], 3) == [
        3,
        0,
        0,
    ]


def test_multiples_are_rounded_layer_by_layer_and_need_not_be_nested() -> None:
    """Why: a layer's total is rounded, and the experts that are rounded up are those whose next atomic
    experts score highest. A higher ratio that takes one expert down to the multiple below leaves its place to
    another, which then grows."""
    brought_back = 0
    for seed in range(20):
        scores, widths, costs = random_case(seed)
        plans = list(plans_by_ratio(scores, widths, costs, {"scope": "global", "width_multiple": 4}).values())
        for earlier, later in pairwise(plans):
            brought_back += sum(
                int((kept_EF & ~earlier.layers[index]).sum()) for index, kept_EF in later.layers.items()
            )
    assert brought_back > 0
