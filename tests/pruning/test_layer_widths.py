"""One width per layer: where multiples go, how near the ratio is met, and that lower ratios are contained."""

from __future__ import annotations

import json
from itertools import pairwise, product
from pathlib import Path

import pytest
import torch

from heapr.errors import ConfigError
from heapr.model.modelling_file import OLDEST_TRANSFORMERS
from heapr.pruning.allocation import allocate
from heapr.pruning.budget import Budget
from heapr.types import Plan, Scores
from tests.experiment import compose_experiment, run_in, write_texts
from tests.tiny import byte_tokenizer, tiny_model


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
    asked = max(72 * (1 - ratio), 3 * 3 * multiple)  # a multiple of every layer stays
    assert abs(asked - found.num_kept) <= 3 * multiple / 2 + 1e-9
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


def test_a_run_writes_a_checkpoint_of_one_width_per_layer(tmp_path: Path) -> None:
    tiny_model("qwen3_moe", moe_intermediate_size=32).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    settings = ["model=hf", f"model.path={tmp_path / 'model'}", "model.dtype=float32", *write_texts(tmp_path)]
    settings += [
        "evaluation.throughput=null",
        "evaluation.truth=null",
        "recipe=stock",
        "pruning.form=per_layer",
    ]
    summary = run_in(tmp_path, *settings, "pruning.ratio=0.4")
    stage = [stage for stage in summary.stages if stage["stage"] == "prune"][-1]
    folder = Path(stage["path"]) / "checkpoint"
    config = json.loads((folder / "config.json").read_text())
    widths = [set(width_E) for width_E in config["expert_widths"].values()]
    assert all(len(width) == 1 and min(width) % 8 == 0 for width in widths)
    total = sum(min(width) for width in widths)
    assert (
        config["heapr"]["ratio_reached"]
        == 1 - total / 64
        == summary.metrics["size"]["atomic_experts_removed_ratio"]
    )
    assert "form `per_layer`, one width per layer, a multiple of 8" in (folder / "README.md").read_text()
    assert OLDEST_TRANSFORMERS in (folder / "README.md").read_text()
    assert not summary.metrics["pruned"]["parameters_zero"]


def test_a_scope_that_gives_experts_of_a_layer_several_widths_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="gives every expert of a layer one width, which scope 'global' does not"
    ):
        compose_experiment("pruning=global", "pruning.form=per_layer")
