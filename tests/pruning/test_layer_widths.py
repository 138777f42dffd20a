"""One width per layer: where multiples go, how near the ratio is met, and that lower ratios are contained."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
import torch

from heapr.pruning.allocation import allocate
from heapr.pruning.budget import Budget
from heapr.types import Plan, Scores


def plan_of(scores: dict[int, torch.Tensor], ratio: float, multiple: int = 1) -> Plan:
    budget = Budget(ratio, "expert", experts_per_token=1, width_multiple=multiple, one_width_per_layer=True)
    widths = {index: [scores_EF.shape[1]] * len(scores_EF) for index, scores_EF in scores.items()}
    return allocate(Scores(layers=scores), widths, budget)


def random_scores(seed: int = 0) -> dict[int, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        index: torch.rand(3, 8, generator=generator) * scale
        for index, scale in ((0, 1.0), (2, 2.0), (5, 4.0))
    }


def test_the_layer_whose_lowest_are_lowest_on_average_loses_next() -> None:
    """By hand, two experts of three: layer 0 loses (1, 2), mean 1.5, then (3, 4), mean 3.5; layer 1 (0, 4), mean 2,
    then (5, 5). Half of 12 are 6, in pairs: layer 0 once, layer 1 once, layer 0 again."""
    scores = {0: torch.tensor([[9.0, 1, 3], [4, 2, 9]]), 1: torch.tensor([[0.0, 5, 9], [5, 4, 9]])}
    kept = plan_of(scores, 0.5).layers
    assert kept[0].tolist() == [[True, False, False], [False, False, True]]
    assert kept[1].tolist() == [[False, True, True], [True, False, True]]


@pytest.mark.parametrize("multiple", [1, 2, 4])
@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 0.7])
def test_no_other_widths_of_this_size_keep_more(ratio: float, multiple: int) -> None:
    scores = random_scores()
    found = plan_of(scores, ratio, multiple)
    widths = [set(width_E) for width_E in found.widths.values()]
    assert all(len(width) == 1 and min(width) % multiple == 0 and min(width) > 0 for width in widths)
    assert abs(72 * (1 - ratio) - found.num_kept) <= 3 * multiple / 2
    sorted_EF = {index: scores_EF.sort(dim=1, descending=True).values for index, scores_EF in scores.items()}
    kept_scores = []
    for candidate in product(range(multiple, 9, multiple), repeat=3):
        if 3 * sum(candidate) == found.num_kept:
            parts = zip(sorted_EF.values(), candidate, strict=True)
            kept_scores.append(sum(float(layer_EF[:, :width].sum()) for layer_EF, width in parts))
    kept = sum(float(scores[index][kept_EF].sum()) for index, kept_EF in found.layers.items())
    assert kept == pytest.approx(max(kept_scores))


def test_what_a_ratio_removes_every_higher_one_removes_too() -> None:
    plans = [plan_of(random_scores(), ratio / 20, 2) for ratio in range(20)]
    for less, more in pairwise(plans):
        assert all(not (more.layers[index] & ~kept_EF).any() for index, kept_EF in less.layers.items())
