"""What guards keep: floors, protected layers, tempering; against every other choice, and in rounds."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest
import torch

from heapr.errors import ConfigError
from heapr.pruning.allocation import allocate, temper
from heapr.pruning.allocation_report import report_allocation
from heapr.pruning.budget import Budget, Guards, Widths
from heapr.schema import build
from heapr.steps import experiment_steps
from heapr.types import Granularity, Plan, Scores
from tests.experiment import compose_experiment
from tests.pruning.test_allocation import ragged_scores, random_scores


def widths_of(scores: Scores) -> dict[int, list[int]]:
    return {index: [scores_EF.shape[1]] * len(scores_EF) for index, scores_EF in scores.layers.items()}


def guarded(scores: Scores, *, ratio: float, scope: str = "global", width_multiple: int = 1, **guards: object) -> Plan:
    budget = Budget(ratio=ratio, scope=scope, experts_per_token=1, width_multiple=width_multiple, guards=Guards(**guards))
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


def test_floors_and_protection_by_hand() -> None:
    assert kept_counts(guarded(LOW_AND_HIGH, ratio=0.5)) == {0: [0, 1], 1: [4, 3]}  # layer 0 keeps its best, 9 goes instead
    assert kept_counts(guarded(LOW_AND_HIGH, ratio=0.5, min_expert_ratio=0.25)) == {0: [1, 1], 1: [3, 3]}
    assert kept_counts(guarded(LOW_AND_HIGH, ratio=0.5, min_expert_ratio=0.26)) == {0: [2, 2], 1: [2, 2]}
    assert kept_counts(guarded(LOW_AND_HIGH, ratio=0.5, min_layer_ratio=0.375)) == {0: [0, 3], 1: [2, 3]}
    assert kept_counts(guarded(LOW_AND_HIGH, ratio=0.5, min_layer_ratio=0.5, min_expert_ratio=0.25)) == {0: [1, 3], 1: [1, 3]}
    assert kept_counts(guarded(LOW_AND_HIGH, ratio=0.25, protected_layers=(0,))) == {0: [4, 4], 1: [1, 3]}


@pytest.mark.parametrize("experts", [0.0, 0.3])
@pytest.mark.parametrize("layers", [0.0, 0.3, 0.5])
def test_no_other_plan_within_the_floors_keeps_a_higher_score(experts: float, layers: float) -> None:
    """Against every choice of 5 of 12 atomic experts."""
    scores = random_scores(num_layers=2, num_experts=2, width=3)
    scores.layers[0][:] *= 0.1
    flat, owner = torch.cat([scores_EF.flatten() for scores_EF in scores.layers.values()]), torch.arange(12) // 3
    best = -1.0
    for removed in combinations(range(12), 5):
        kept = torch.ones(12, dtype=torch.bool)
        kept[list(removed)] = False
        per_expert = torch.bincount(owner[kept], minlength=4)
        per_layer = per_expert.view(2, 2).sum(dim=1)
        if (per_expert >= 3 * experts - 1e-9).all() and (per_layer >= max(1, 6 * layers - 1e-9)).all():
            best = max(best, float(flat[kept].double().sum()))
    plan = guarded(scores, ratio=5 / 12, min_expert_ratio=experts, min_layer_ratio=layers)
    kept = torch.cat([kept_EF.flatten() for kept_EF in plan.layers.values()])
    assert int(kept.sum()) == 7
    assert float(flat[kept].double().sum()) == pytest.approx(best)


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("width_multiple", [1, 8])
@pytest.mark.parametrize("ratio", [0.0, 0.33, 0.6])
def test_floors_hold_and_the_total_is_exact(ratio: float, width_multiple: int, scope: str) -> None:
    generator = torch.Generator().manual_seed(2)
    scores = Scores(layers={index: torch.rand(5, 32, generator=generator) ** (1 + 3 * index) for index in (0, 1, 4)})
    floors = {"min_expert_ratio": 0.2, "min_layer_ratio": 0.35 if scope == "global" else 0.0}
    plan = guarded(scores, ratio=ratio, scope=scope, width_multiple=width_multiple, **floors)
    counts = kept_counts(plan)
    least = 7 if width_multiple == 1 else 8  # 6.4 rounded up, to a multiple
    assert min(min(widths) for widths in counts.values()) >= least
    if scope == "global":
        assert min(sum(widths) for widths in counts.values()) >= 56
    if width_multiple == 1:
        assert plan.num_kept == 480 - int(ratio * 480 + 0.5)
        if ratio == 0.6 and scope == "global":  # the floor was needed, and is no higher
            assert min(min(widths) for widths in counts.values()) == least
    else:
        assert not any(width % 8 for widths in counts.values() for width in widths)


@pytest.mark.parametrize("ratio", [0.2, 0.37])
def test_with_protected_layers_the_others_lose_so_much_more(ratio: float) -> None:
    scores = random_scores()
    for scope in ("global", "layer"):
        plan = guarded(scores, ratio=ratio, scope=scope, protected_layers=(2,))
        assert plan.layers[2].all() and plan.num_kept == 105 - int(ratio * 105 + 0.5)
        lost = [int((~plan.layers[index]).sum()) for index in (0, 4)]
        assert scope == "global" or abs(lost[0] - lost[1]) <= 1


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("unit", ["atomic_experts", "flops"])
@pytest.mark.parametrize("width_multiple", [1, 2])
def test_a_protected_layer_with_fewer_experts_than_a_token_needs_loses_nothing(scope: str, unit: str, width_multiple: int) -> None:
    """Layer 0 has one expert left, tokens go to two. The empty one must not take the place of what is there."""
    scores = random_scores(num_layers=2, num_experts=3, width=8)
    widths = {0: [0, 6, 0], 2: [8, 8, 8]}
    costs = None if unit == "atomic_experts" else {index: torch.ones(3, dtype=torch.float64) for index in widths}
    guards = Guards(protected_layers=(0,))
    budget = Budget(ratio=0.4, scope=scope, experts_per_token=2, unit=unit, width_multiple=width_multiple, guards=guards)
    budget.check(widths)
    plan = allocate(scores, widths, budget, costs)
    assert plan.widths[0] == [0, 6, 0] and plan.num_kept == 18


def test_a_layer_with_fewer_atomic_experts_than_a_token_needs_experts_stays_as_it_is() -> None:
    """One atomic expert of one expert is left and tokens go to two: refused at every ratio before, although others can go."""
    scores, widths = random_scores(num_layers=2, num_experts=3, width=8), {0: [0, 1, 0], 2: [8, 8, 8]}
    budget = Budget(ratio=0.4, scope="global", experts_per_token=2)
    budget.check(widths)
    assert allocate(scores, widths, budget).widths[0] == [0, 1, 0]


def test_tempering_by_hand() -> None:
    """Means 1 and 4, of which 2.5 is the mean; what no token reached (-1) and what is not there (-inf) do not count."""
    layers = {0: torch.tensor([[0.0, 2.0], [-1.0, -torch.inf]]), 3: torch.tensor([[3.0, 5.0]]), 5: torch.tensor([[0.0, 0.0]])}
    assert all(torch.equal(tempered, layers[index]) for index, tempered in temper(layers, 0.0).items())
    wholly = temper(layers, 1.0)
    assert wholly[0].tolist() == [[0.0, 5.0], [-2.5, -torch.inf]]
    assert wholly[3].tolist() == [[1.875, 3.125]]
    assert wholly[5].tolist() == [[0.0, 0.0]]
    assert temper(layers, 0.5)[3].tolist() == [pytest.approx([3 * 0.625**0.5, 5 * 0.625**0.5])]


def test_tempering_moves_removal_from_weak_layers_to_strong_ones() -> None:
    scores = random_scores()
    scores.layers[0][:] *= 0.1
    kept = [guarded(scores, ratio=0.3, tempering=tempering).layers[0].sum() for tempering in (0.0, 0.5, 1.0)]
    assert kept[0] < kept[1] < kept[2]


def test_floors_of_several_rounds_are_those_of_the_first_widths() -> None:
    scores = random_scores(width=10)
    original, widths = widths_of(scores), widths_of(scores)
    budget = Budget(ratio=0.56, scope="global", experts_per_token=2, guards=Guards(min_expert_ratio=0.3, min_layer_ratio=0.42))
    for ratio in (0.3, 0.5, 0.56):
        plan = allocate(scores, widths, budget.of_round(ratio, widths, original, None))
        widths = kept_counts(plan)
        scores = Scores(layers={index: packed(scores.layers[index], kept_EF) for index, kept_EF in plan.layers.items()})
    assert sum(map(sum, widths.values())) == 66  # 150, 105, 75, 66
    assert all(min(width_E) >= 3 and sum(width_E) >= 21 for width_E in widths.values())
    assert min(min(width_E) for width_E in widths.values()) == 3
    assert min(budget.expert_floors(0, widths[0])) == 1  # without original widths: of what is there now


def packed(scores_EF: torch.Tensor, kept_EF: torch.Tensor) -> torch.Tensor:
    """As surgery leaves them: kept ones first."""
    order_EF = (~kept_EF).int().argsort(dim=1, stable=True)
    return scores_EF.gather(1, order_EF)


def test_ragged_experts_have_floors_too() -> None:
    scores, widths = ragged_scores()
    plan = allocate(scores, widths, Budget(ratio=0.5, scope="global", experts_per_token=2, guards=Guards(min_expert_ratio=0.4)))
    for index, width_E in widths.items():
        least = [-(-4 * width // 10) for width in width_E]
        assert all(kept >= floor for kept, floor in zip(kept_counts(plan)[index], least, strict=True))
        assert not any(kept_F[width:].any() for kept_F, width in zip(plan.layers[index], width_E, strict=True))


@pytest.mark.parametrize(
    ("guards", "message"),
    [
        ({"protected_layers": (1,)}, "layer 1 is no MoE layer of this model; choose of 0, 2, 4"),
        ({"protected_layers": (0, 2, 4)}, "protects every MoE layer"),
        ({"protected_layers": (0, 2)}, "is more of the atomic experts than the floors, the protected layers and the 1 experts"),
        ({"min_expert_ratio": 0.6}, "choose a lower ratio or guard less"),
        ({"min_layer_ratio": 0.6}, "choose a lower ratio or guard less"),
    ],
)
def test_guards_that_cannot_be_are_refused_before_there_are_scores(guards: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        Budget(ratio=0.5, scope="global", experts_per_token=1, guards=Guards(**guards)).check(widths_of(random_scores()))
    assert "\n" not in str(caught.value)


def test_whole_experts_have_no_guards() -> None:
    widths: Widths = widths_of(random_scores())
    for changes in ({"guards": Guards(tempering=0.5)}, {"unit": "flops"}):
        budget = Budget(ratio=0.2, scope="global", experts_per_token=1, granularity=Granularity.EXPERT, **changes)
        with pytest.raises(ConfigError, match="this one removes whole experts"):
            budget.check(widths)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["pruning.min_expert_ratio=1"], "min_expert_ratio=1.0 is not in"),
        (["pruning.tempering=1.5"], "tempering=1.5 is not in"),
        (["pruning.budget=flop"], "budget='flop' is unknown; choose one of atomic_experts, flops, bytes"),
        (["pruning=layer", "pruning.tempering=0.5"], "tempering=0.5 has no effect with scope 'layer'"),
        (["pruning=layer", "pruning.min_layer_ratio=0.5"], "min_layer_ratio=0.5 has no effect with scope 'layer'"),
        (["pruning=expert", "pruning.protected_layers=[0]"], "protected_layers=.* has no effect with scope 'expert'"),
        (["pruning=expert", "pruning.budget=bytes"], "budget=bytes has no effect with scope 'expert'"),
    ],
)
def test_options_that_make_no_sense_are_refused_by_the_schema(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose_experiment(*overrides)


def test_the_report_says_what_guards_changed() -> None:
    budget = Budget(ratio=0.5, scope="global", experts_per_token=1, guards=Guards(min_expert_ratio=0.25))
    plan = guarded(LOW_AND_HIGH, ratio=0.5, min_expert_ratio=0.25)
    report = report_allocation(plan, LOW_AND_HIGH, widths_of(LOW_AND_HIGH), budget)
    assert report["atomic_experts_exchanged_by_guards"] == 1  # the 4 stays and an 11 goes
    assert report["kept_score_without_guards"] - report["kept_score"] == 11 - 4
    assert "guards keep 1 atomic experts that would go without" in report["summary"][1]


def test_options_enter_the_key_where_they_are_not_at_their_defaults(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text")

    def settings(*overrides: str) -> dict[str, object]:
        config = compose_experiment("calibration=text_files", f"calibration.corpus.paths=[{tmp_path}/a.txt]", *overrides)
        corpus = build(config.calibration.corpus, "calibration.corpus")
        return dict(experiment_steps(config, {"sha256": "0"}, corpus, []).last("prune").origin.config)

    plain = {"ratio": 0.25, "scope": "global", "width_multiple": 1, "form": "ragged"}
    assert settings() == settings("pruning.tempering=0", "pruning.save_checkpoint=false") == plain
    assert settings("pruning.tempering=0.5", "pruning.budget=flops") == plain | {"tempering": 0.5, "budget": "flops"}
