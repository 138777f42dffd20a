"""Protected layers lose nothing, and the others correspondingly more."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from heapr.errors import ConfigError
from heapr.plugins import build
from heapr.pruning.allocation import allocate
from heapr.pruning.allocation_report import report_allocation
from heapr.pruning.budget import Budget, Widths
from heapr.steps import experiment_steps
from heapr.types import Granularity, Plan, Scores
from tests.experiment import compose_experiment
from tests.pruning.test_allocation import random_scores


def widths_of(scores: Scores) -> dict[int, list[int]]:
    return {index: [scores_EF.shape[1]] * len(scores_EF) for index, scores_EF in scores.layers.items()}


def plan_of(
    scores: Scores, *, ratio: float, scope: str = "global", protected_layers: tuple[int, ...] = ()
) -> Plan:
    budget = Budget(ratio=ratio, scope=scope, experts_per_token=1, protected_layers=protected_layers)
    budget.check(widths_of(scores))
    return allocate(scores, widths_of(scores), budget)


def kept_counts(plan: Plan) -> dict[int, list[int]]:
    return {index: kept_EF.sum(dim=1).tolist() for index, kept_EF in plan.layers.items()}


LOW_AND_HIGH = Scores(
    layers={
        0: torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]]),
        1: torch.tensor([[11.0, 12.0, 13.0, 14.0], [9.0, 15.0, 16.0, 17.0]]),
    }
)


def test_by_hand() -> None:
    # Layer 0 keeps its best, 9 goes instead.
    assert kept_counts(plan_of(LOW_AND_HIGH, ratio=0.5)) == {
        0: [0, 1],
        1: [4, 3],
    }
    assert kept_counts(plan_of(LOW_AND_HIGH, ratio=0.25, protected_layers=(0,))) == {0: [4, 4], 1: [1, 3]}


@pytest.mark.parametrize("ratio", [0.2, 0.37])
def test_with_protected_layers_the_others_lose_so_much_more(ratio: float) -> None:
    scores = random_scores()
    for scope in ("global", "layer"):
        plan = plan_of(scores, ratio=ratio, scope=scope, protected_layers=(2,))
        assert plan.layers[2].all() and plan.num_kept == 105 - int(ratio * 105 + 0.5)
        lost = [int((~plan.layers[index]).sum()) for index in (0, 4)]
        assert scope == "global" or abs(lost[0] - lost[1]) <= 1


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("unit", ["atomic_experts", "flops"])
@pytest.mark.parametrize("width_multiple", [1, 2])
def test_a_protected_layer_with_fewer_experts_than_a_token_needs_loses_nothing(
    scope: str, unit: str, width_multiple: int
) -> None:
    """Layer 0 has one expert left, tokens go to two. The empty one must not take the place of what is
    there."""
    scores = random_scores(num_layers=2, num_experts=3, width=8)
    widths = {0: [0, 6, 0], 2: [8, 8, 8]}
    costs = (
        None if unit == "atomic_experts" else {index: torch.ones(3, dtype=torch.float64) for index in widths}
    )
    settings = {"unit": unit, "width_multiple": width_multiple, "protected_layers": (0,)}
    budget = Budget(ratio=0.4, scope=scope, experts_per_token=2, **settings)
    budget.check(widths)
    plan = allocate(scores, widths, budget, costs)
    assert plan.widths[0] == [0, 6, 0] and plan.num_kept == 18


def test_a_layer_with_fewer_atomic_experts_than_a_token_needs_experts_stays_as_it_is() -> None:
    """One atomic expert of one expert is left and tokens go to two: refused at every ratio before, although
    others can go."""
    scores, widths = random_scores(num_layers=2, num_experts=3, width=8), {0: [0, 1, 0], 2: [8, 8, 8]}
    budget = Budget(ratio=0.4, scope="global", experts_per_token=2)
    budget.check(widths)
    assert allocate(scores, widths, budget).widths[0] == [0, 1, 0]


@pytest.mark.parametrize(
    ("protected_layers", "message"),
    [
        ((1,), "layer 1 is not an MoE layer of this model; choose from 0, 2, 4"),
        ((0, 2, 4), "protects every MoE layer"),
        (
            (0, 2),
            "is more of the atomic experts than the protected layers and the 1 experts of every token leave",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_there_are_scores(
    protected_layers: tuple[int, ...], message: str
) -> None:
    budget = Budget(ratio=0.5, scope="global", experts_per_token=1, protected_layers=protected_layers)
    with pytest.raises(ConfigError, match=message) as caught:
        budget.check(widths_of(random_scores()))
    assert "\n" not in str(caught.value)


def test_whole_experts_are_not_protected_and_not_counted_in_flops() -> None:
    widths: Widths = widths_of(random_scores())
    for changes in ({"protected_layers": (0,)}, {"unit": "flops"}):
        budget = Budget(
            ratio=0.2, scope="global", experts_per_token=1, granularity=Granularity.EXPERT, **changes
        )
        with pytest.raises(ConfigError, match="but this one removes whole experts"):
            budget.check(widths)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["pruning.budget=flop"], "budget='flop' is unknown; choose one of atomic_experts, flops"),
        (
            ["pruning=expert", "pruning.protected_layers=[0]"],
            "protected_layers=.* has no effect with scope 'expert'",
        ),
        (["pruning=expert", "pruning.budget=flops"], "budget=flops has no effect with scope 'expert'"),
    ],
)
def test_options_that_make_no_sense_are_refused_by_the_schema(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose_experiment(*overrides)


def test_the_report_says_what_protection_changed() -> None:
    budget = Budget(ratio=0.25, scope="global", experts_per_token=1, protected_layers=(0,))
    plan = plan_of(LOW_AND_HIGH, ratio=0.25, protected_layers=(0,))
    report = report_allocation(plan, LOW_AND_HIGH, widths_of(LOW_AND_HIGH), budget)
    assert report["atomic_experts_exchanged_by_protection"] == 4  # 1, 2, 3, 4 stay and 9, 11, 12, 13 go
    assert report["kept_score_without_protection"] - report["kept_score"] == 45 - 10
    assert "protection keeps 4 atomic experts that would otherwise be removed" in report["summary"][1]


def test_options_enter_the_key_where_they_are_not_at_their_defaults(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text")

    def settings(*overrides: str) -> dict[str, object]:
        config = compose_experiment(
            "calibration=text_files", f"calibration.corpus.paths=[{tmp_path}/a.txt]", *overrides
        )
        corpus = build(config.calibration.corpus, "calibration.corpus")
        return dict(
            experiment_steps(config, corpus, [], model={"sha256": "0"}, machine={})
            .last("prune")
            .origin.config
        )

    plain = {"ratio": 0.25, "scope": "global", "width_multiple": 1, "form": "ragged"}
    assert settings() == settings("pruning.protected_layers=[]", "pruning.save_checkpoint=false") == plain
    assert settings("pruning.protected_layers=[0]", "pruning.budget=flops") == plain | {
        "protected_layers": [0],
        "budget": "flops",
    }
