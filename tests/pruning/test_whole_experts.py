"""Allocation of whole experts: which ones, how many, who stays, what is refused; and a run from end to
end."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import heapr
from heapr.errors import ConfigError
from heapr.model.moe import MoEModel
from heapr.pruning.allocation import allocate
from heapr.pruning.allocation_report import report_allocation
from heapr.pruning.budget import Budget, Widths
from heapr.types import Granularity, Plan, Scores
from tests.experiment import cached_stages, run_in, write_model, write_texts
from tests.tiny import tiny_ids


def budget_of(ratio: float, scope: str, experts_per_token: int = 1, width_multiple: int = 1) -> Budget:
    return Budget(
        ratio=ratio,
        scope=scope,
        experts_per_token=experts_per_token,
        width_multiple=width_multiple,
        granularity=Granularity.EXPERT,
    )


def scores_of(*layers: list[float], width: int) -> Scores:
    """One score per expert, layers 0, 2, 4, ..."""
    return Scores(
        layers={
            2 * number: torch.tensor(layer).unsqueeze(1).repeat(1, width)
            for number, layer in enumerate(layers)
        }
    )


def removed_of(plan: Plan, widths: Widths) -> dict[int, list[int]]:
    """The experts that went, having checked that all others are whole."""
    for index, kept_EF in plan.layers.items():
        for kept_F, width in zip(kept_EF, widths[index], strict=True):
            assert kept_F.tolist() in (
                [True] * width + [False] * (len(kept_F) - width),
                [False] * len(kept_F),
            )
    return {
        index: [expert for expert, kept_F in enumerate(kept_EF) if widths[index][expert] and not kept_F.any()]
        for index, kept_EF in plan.layers.items()
    }


def removed(
    scores: Scores, ratio: float, scope: str, experts_per_token: int = 1, width_multiple: int = 1
) -> dict[int, list[int]]:
    widths = {index: [scores_EF.shape[1]] * len(scores_EF) for index, scores_EF in scores.layers.items()}
    budget = budget_of(ratio, scope, experts_per_token, width_multiple)
    budget.check(widths)
    return removed_of(allocate(scores, widths, budget), widths)


TWO_LAYERS = scores_of([4.0, 1.0, 3.0, 2.0], [8.0, 7.0, 1.5, 6.0], width=3)


def test_the_lowest_experts_go() -> None:
    assert removed(TWO_LAYERS, 0.375, "global") == {0: [1, 3], 2: [2]}
    assert removed(TWO_LAYERS, 0.5, "global") == {0: [1, 2, 3], 2: [2]}
    assert removed(TWO_LAYERS, 0.5, "layer") == {0: [1, 3], 2: [2, 3]}
    assert removed(TWO_LAYERS, 0.0, "global") == {0: [], 2: []}


@pytest.mark.parametrize(
    ("ratio", "number"), [(0.06, 0), (0.0625, 1), (0.18, 1), (0.19, 2), (0.3125, 3), (0.43, 3), (0.44, 4)]
)
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_the_number_is_the_nearest(ratio: float, number: int, scope: str) -> None:
    """Of 8 experts; a number that lies between two is rounded up."""
    assert sum(map(len, removed(TWO_LAYERS, ratio, scope).values())) == number


def test_layers_lose_the_same_share_up_to_one_expert_and_the_total_is_the_nearest() -> None:
    scores = Scores(
        layers={
            index: torch.rand(8, 1, generator=torch.Generator().manual_seed(index)).repeat(1, 5)
            for index in range(4)
        }
    )
    # 2.48 each, 9.92 in all.
    assert [len(experts) for experts in removed(scores, 0.31, "layer").values()] == [
        3,
        3,
        2,
        2,
    ]


def test_every_layer_keeps_as_many_experts_as_a_token_needs() -> None:
    assert removed(TWO_LAYERS, 0.5, "global", experts_per_token=2) == {0: [1, 3], 2: [2, 3]}
    assert removed(TWO_LAYERS, 0.25, "global", experts_per_token=3) == {0: [1], 2: [2]}
    assert removed(TWO_LAYERS, 0.25, "layer", experts_per_token=3) == {0: [1], 2: [2]}


def test_ties_are_broken_by_position() -> None:
    equal = scores_of([1.0] * 4, [1.0] * 4, width=2)
    # The first of equals is the layer's best and stays.
    assert removed(equal, 0.5, "global") == {
        0: [1, 2, 3],
        2: [1],
    }
    assert removed(equal, 0.5, "layer") == {0: [1, 2], 2: [1, 2]}


def test_unrouted_experts_go_first() -> None:
    assert removed(scores_of([0.0, 0.0, -1.0, 5.0], [0.0, -1.0, 0.0, 5.0], width=2), 0.25, "global") == {
        0: [2],
        2: [1],
    }


RAGGED = {0: [6, 0, 2, 4], 2: [1, 6, 6, 3]}  # 12 and 16 atomic experts


def test_experts_of_individual_widths() -> None:
    """Atomic experts are counted, not experts; what lies beyond a width does not count, an expert of none is
    not there."""
    scores = scores_of([3.0, 0.0, 2.0, 1.0], [1.5, 4.0, 2.5, 5.0], width=6)
    for index, width_E in RAGGED.items():
        for expert, width in enumerate(width_E):
            scores.layers[index][expert, width:] = 99.0

    def ragged(ratio: float, scope: str, experts_per_token: int = 1) -> dict[int, list[int]]:
        budget = budget_of(ratio, scope, experts_per_token)
        budget.check(RAGGED)
        return removed_of(allocate(scores, RAGGED, budget), RAGGED)

    assert ragged(0.25, "global") == {0: [2, 3], 2: [0]}  # 4 + 1 + 2 is exactly 7
    assert ragged(0.35, "global") == {0: [2, 3], 2: [0]}  # 9.8: 7 is nearer than 13
    assert ragged(0.36, "global") == {0: [2, 3], 2: [0, 2]}  # 10.08
    # 3 of 12: 4 is nearest; 7 - 4 = 3 of 16: 1 is nearer than 7.
    assert ragged(0.25, "layer") == {
        0: [3],
        2: [0],
    }
    # The best two of each layer stay: 11 of 14.
    assert ragged(0.5, "global", experts_per_token=2) == {
        0: [3],
        2: [0, 2],
    }
    with pytest.raises(ConfigError, match="fewer experts than the 2 that every token is routed to"):
        ragged(0.7, "global", experts_per_token=2)  # 20 of 28, but at least 2 + 4 + 1 + 3 stay: 18 at most


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_a_ratio_is_refused_exactly_where_top_k_would_lack_experts(scope: str) -> None:
    widths = {0: [4] * 32, 1: [4] * 32}
    budget_of(0.875, scope, experts_per_token=4).check(widths)  # 28 of 32 each
    with pytest.raises(
        ConfigError, match="would leave a layer fewer experts than the 4 that every token is routed to"
    ):
        budget_of(0.88, scope, experts_per_token=4).check(widths)


def test_widths_that_are_multiples_stay_multiples() -> None:
    scores = scores_of([4.0, 1.0, 3.0, 2.0], [8.0, 7.0, 1.5, 6.0], width=16)
    assert (
        removed(scores, 0.375, "global", width_multiple=16)
        == removed(scores, 0.375, "global")
        == {
            0: [1, 3],
            2: [2],
        }
    )
    with pytest.raises(ConfigError, match="not a multiple of it"):
        removed(TWO_LAYERS, 0.375, "global", width_multiple=16)


def test_the_report_says_how_many_experts_went() -> None:
    widths, budget = {0: [3] * 4, 2: [3] * 4}, budget_of(0.3, "global", width_multiple=1)
    report = report_allocation(allocate(TWO_LAYERS, widths, budget), TWO_LAYERS, widths, budget)
    assert report["summary"] == [
        "removes 6 of 24 atomic experts (asked for 7.2)",
        "these are 2 of 8 experts, removed whole",
    ]
    assert report["atomic_experts_removed"] == 6 and report["atomic_experts_exchanged"] == 0


def test_what_cannot_be_reached_is_said_with_its_number() -> None:
    """Layer 0: the two best are all but 2 of 14, and the two narrowest, by which the ratio was judged, are
    not the best."""
    widths = {0: [6, 6, 1, 1], 2: [4, 4, 4, 2]}
    scores = scores_of([8.0, 7.0, 1.0, 2.0], [8.0, 7.0, 1.0, 2.0], width=6)
    for scope, going in (("global", 8), ("layer", 8)):
        budget = budget_of(0.5, scope, experts_per_token=2)
        budget.check(widths)
        plan = allocate(scores, widths, budget)
        assert sum(map(sum, widths.values())) - plan.num_kept == going
        lines = report_allocation(plan, scores, widths, budget)["not_reached"]
        assert (
            lines[0]
            == f"{going} atomic experts are removed instead of 14: the rest must stay, because every token is"
            " routed to 2 experts and as many of each layer stay whole"
        )
        assert [line.partition(",")[0] for line in lines[1:]] == (
            []
            if scope == "global"
            else ["layer 0: 2 atomic experts are removed instead of 7: the rest must stay"]
        )
    reached = budget_of(0.25, "global", experts_per_token=2)
    assert report_allocation(allocate(scores, widths, reached), scores, widths, reached)["not_reached"] == []


def widths_of(model: MoEModel) -> list[list[int]]:
    return [list(layer.widths) for layer in model.layers]


@pytest.fixture
def overrides(tmp_path: Path) -> list[str]:
    write_model(tmp_path / "model")
    model = ["model=hf", f"model.path={tmp_path / 'model'}", "model.dtype=float32"]
    return [*model, *write_texts(tmp_path), "evaluation.throughput=null", "score=heapr_expert"]


def test_a_run_removes_whole_experts_and_pruned_equals_masked(tmp_path: Path, overrides: list[str]) -> None:
    ragged = run_in(tmp_path, *overrides, "pruning.ratio=0.25")
    masked = run_in(tmp_path, *overrides, "pruning.ratio=0.25", "pruning.form=masked")
    assert cached_stages(masked)["score"] and not cached_stages(masked)["prune"]  # scores come from the store
    assert (
        ragged.metrics["size"]["atomic_experts_removed_ratio"]
        == masked.metrics["size"]["atomic_experts_removed_ratio"]
        == 0.25
    )
    folders = [
        Path(next(s["path"] for s in run.stages if s["stage"] == "prune")) / "checkpoint"
        for run in (ragged, masked)
    ]
    pruned, zeroed = (
        heapr.load_pruned(folders[0]),
        AutoModelForCausalLM.from_pretrained(folders[1], dtype=torch.float32),
    )
    widths = widths_of(MoEModel(pruned))
    assert sorted(width for width_E in widths for width in width_E) == [0] * 2 + [8] * 6
    assert all(width_E.count(8) >= 2 for width_E in widths)
    ids_NW = tiny_ids(2, 12)
    with torch.no_grad():
        logits, expected = (
            model.eval()(input_ids=ids_NW, use_cache=False).logits for model in (pruned, zeroed)
        )
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["ragged", "uniform"])
def test_a_run_that_ranks_inside_an_expert_is_refused_before_any_work(
    tmp_path: Path, overrides: list[str], form: str
) -> None:
    message = (
        "scope=expert ranks inside each expert, but score HeaprExpert removes whole experts; use"
        " pruning=global or pruning=layer"
    )
    with pytest.raises(ConfigError, match=message):
        run_in(tmp_path, *overrides, "pruning=expert", f"pruning.form={form}")
    assert not (tmp_path / "outputs" / "artifacts").exists()
