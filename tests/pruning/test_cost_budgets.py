"""Budgets in FLOPs: against every other choice, by hand, and against what is measured on a pruned model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from heapr.errors import ConfigError
from heapr.pruning.allocation import allocate
from heapr.pruning.allocation_report import report_allocation
from heapr.pruning.budget import Budget, Costs, costs_of
from heapr.types import LayerStatistics, Plan, Scores, Statistics
from tests.experiment import run_in, write_model, write_texts
from tests.pruning.test_allocation import random_scores
from tests.pruning.test_protected_layers import kept_counts, widths_of


def budget_of(ratio: float, scope: str = "global", unit: str = "flops", **settings: object) -> Budget:
    return Budget(ratio=ratio, scope=scope, experts_per_token=1, unit=unit, **settings)


def removed_cost(plan: Plan, costs: Costs) -> float:
    return sum(float((costs[index] * (~kept_EF).sum(dim=1)).sum()) for index, kept_EF in plan.layers.items())


def random_costs(scores: Scores) -> Costs:
    generator = torch.Generator().manual_seed(5)
    return {
        index: torch.rand(len(scores_EF), generator=generator).double() * 9 + 1
        for index, scores_EF in scores.layers.items()
    }


def test_costs_are_visits_times_weights() -> None:
    layers = {index: LayerStatistics.zeros(3, 2, torch.device("cpu")) for index in (1, 2)}
    layers[1].count_E[:] = torch.tensor([5.0, 0.0, 7.0])
    statistics = Statistics(layers=layers, num_tokens=6, num_predicted_tokens=5, loss_sum=1.0)
    parameters = {1: 30, 2: 40}
    assert costs_of("atomic_experts", statistics, parameters) is None
    flops = costs_of("flops", statistics, parameters)
    assert flops is not None
    assert flops[1].tolist() == [150, 0, 210] and flops[2].tolist() == [0, 0, 0]


def test_by_hand() -> None:
    """Score for cost: 1/10, 2/10, 6/10, 9/10 of the first expert, 1, 2, 6, 9 of the second; half of the cost
    of 44 is 22."""
    scores = Scores(layers={0: torch.tensor([[1.0, 9.0, 2.0, 6.0], [9.0, 6.0, 2.0, 1.0]])})
    costs = {0: torch.tensor([10.0, 1.0], dtype=torch.float64)}
    plan = allocate(scores, widths_of(scores), budget_of(0.5), costs)
    assert plan.layers[0].tolist() == [[False, True, False, True], [True, True, True, True]]
    plan = allocate(scores, widths_of(scores), budget_of(0.7), costs)  # 30.8: 30 is nearer than 40
    assert kept_counts(plan) == {0: [1, 4]}
    plan = allocate(scores, widths_of(scores), budget_of(0.95), costs)  # 41.8: 42
    assert kept_counts(plan) == {0: [0, 2]}


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_layers_that_cost_nothing_leave_too_little_to_remove(scope: str) -> None:
    scores = random_scores(num_layers=2, num_experts=2, width=4)
    first, second = scores.layers
    costs = {first: torch.ones(2, dtype=torch.float64), second: torch.zeros(2, dtype=torch.float64)}
    with pytest.raises(ConfigError, match="more of the flops than the protected layers"):
        allocate(scores, widths_of(scores), budget_of(0.5, scope, protected_layers=(first,)), costs)


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.4, 0.5])
@pytest.mark.parametrize("width_multiple", [1, 8])
def test_no_other_choice_of_that_cost_removes_less(ratio: float, scope: str, width_multiple: int) -> None:
    """Against all 4096 ways to remove some of 12 items; an item is one atomic expert, or 8 that go
    together."""
    scores = random_scores(num_layers=2, num_experts=2, width=3 * width_multiple)
    costs, widths = random_costs(scores), widths_of(scores)
    plan = allocate(scores, widths, budget_of(ratio, scope, width_multiple=width_multiple), costs)
    item_scores, item_costs = [], []
    for index, scores_EF in scores.layers.items():
        items_EI = scores_EF.double().sort(dim=1).values.view(2, 3, width_multiple).sum(dim=-1)
        item_scores.append(items_EI.flatten())
        item_costs.append(width_multiple * costs[index].unsqueeze(1).expand(2, 3).flatten())
    choices = torch.tensor(
        [[bool(number >> bit & 1) for bit in range(6)] for number in range(64)], dtype=torch.float64
    )
    wanted = ratio * sum(float(cost_I.sum()) for cost_I in item_costs)
    largest = max(float(cost_I.max()) for cost_I in item_costs)
    assert abs(removed_cost(plan, costs) - wanted) <= largest / 2
    if scope == "global":  # every pair of choices of both layers
        groups = [(torch.cat(item_scores), torch.cat(item_costs), list(scores.layers))]
        choices = torch.cat([choices.repeat_interleave(64, dim=0), choices.repeat(64, 1)], dim=1)
    else:
        groups = [(s, c, [index]) for s, c, index in zip(item_scores, item_costs, scores.layers, strict=True)]
    for score_I, cost_I, indices in groups:
        part = Plan(layers={index: plan.layers[index] for index in indices})
        cost = removed_cost(part, costs)
        score = sum(
            float(scores.layers[index][~kept_EF].double().sum()) for index, kept_EF in part.layers.items()
        )
        feasible = choices @ cost_I >= cost - 1e-9
        assert score == pytest.approx(float((choices @ score_I)[feasible].min()))


def test_layers_lose_the_same_share_of_their_cost() -> None:
    scores = random_scores(width=40)
    costs = random_costs(scores)
    plan = allocate(scores, widths_of(scores), budget_of(0.3, "layer"), costs)
    for index, kept_EF in plan.layers.items():
        share = float((costs[index] * (~kept_EF).sum(dim=1)).sum() / (40 * costs[index].sum()))
        assert share == pytest.approx(0.3, abs=10 / (40 * 10))


def test_equal_costs_are_atomic_experts() -> None:
    scores = random_scores(num_layers=4)
    costs = {index: torch.full((5,), 24.0, dtype=torch.float64) for index in scores.layers}
    for scope in ("global", "layer"):
        plan = allocate(scores, widths_of(scores), budget_of(0.26, scope, unit="flops"), costs)
        counted = allocate(scores, widths_of(scores), budget_of(0.26, scope, unit="atomic_experts"))
        assert all(torch.equal(plan.layers[index], counted.layers[index]) for index in scores.layers)


def test_experts_that_cost_nothing_go_if_their_scores_say_so() -> None:
    scores = Scores(
        layers={
            0: torch.tensor([[3.0, 4.0], [-1.0, -1.0], [5.0, 6.0]]),
            1: torch.tensor([[3.0, 4.0], [0.1, 0.1], [1.0, 2.0]]),
        }
    )
    costs = {index: torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64) for index in (0, 1)}
    assert kept_counts(allocate(scores, widths_of(scores), budget_of(0.25), costs)) == {
        0: [2, 0, 2],
        1: [2, 2, 0],
    }
    assert allocate(scores, widths_of(scores), budget_of(0.0), costs).num_kept == 12


def test_protected_layers_lose_nothing_where_costs_are_counted_either() -> None:
    scores = random_scores(width=16)
    scores.layers[4][:] *= 0.01
    costs = random_costs(scores)
    for width_multiple in (1, 8):
        budget = budget_of(0.25, protected_layers=(4,), width_multiple=width_multiple)
        counts = kept_counts(allocate(scores, widths_of(scores), budget, costs))
        assert counts[4] == [16] * 5 and sum(sum(width_E) for width_E in counts.values()) < 240
        assert not any(width % width_multiple for width_E in counts.values() for width in width_E)
    too_much = budget_of(0.8, protected_layers=(4,))
    too_much.check(widths_of(scores))
    with pytest.raises(ConfigError, match="is more of the flops than the protected layers and the 1 experts"):
        allocate(scores, widths_of(scores), too_much, costs)


def test_the_report_says_what_share_of_the_cost_went() -> None:
    scores = random_scores(width=40)
    costs, budget = random_costs(scores), budget_of(0.3)
    plan = allocate(scores, widths_of(scores), budget, costs)
    report = report_allocation(plan, scores, widths_of(scores), budget, costs)
    total = 40 * sum(float(cost_E.sum()) for cost_E in costs.values())
    assert report["flops_removed_ratio"] == pytest.approx(removed_cost(plan, costs) / total)
    assert "of the routed experts' flops (asked for 30.000%)" in report["summary"][1]


def test_the_flops_that_go_are_those_that_are_measured(tmp_path: Path) -> None:
    settings = [
        "model=hf",
        f"model.path={write_model(tmp_path / 'model')}",
        "model.dtype=float32",
        *write_texts(tmp_path),
    ]
    efficiency = [
        "evaluation=quick",
        "evaluation/evaluators@evaluation=[efficiency]",
        "evaluation.efficiency.window=32",
    ]
    settings = [entry for entry in settings if not entry.startswith("evaluation")] + efficiency
    summary = run_in(tmp_path, *settings, "pruning.budget=flops", "pruning.ratio=0.4")
    folder = next(Path(stage["path"]) for stage in summary.stages if stage["stage"] == "prune")
    removed = json.loads((folder / "allocation.json").read_text())["flops_removed_ratio"]
    assert summary.metrics["size"]["flops_routed_removed_ratio"] == pytest.approx(removed)
    # The most visited of 64 atomic experts costs less than 4 %.
    assert removed == pytest.approx(0.4, abs=0.02)
    card = (folder / "checkpoint" / "README.md").read_text()
    assert "40.0% of its routed experts' FLOPs removed" in card
