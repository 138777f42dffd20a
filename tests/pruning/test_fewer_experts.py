"""Fewer experts: a token goes to the best of those that are left, in the family's own class."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeForCausalLM

from heapr.errors import ConfigError
from heapr.model.moe import MoEModel
from heapr.pruning.fewer_experts import choose_num_experts, fewer_experts_settings, make_fewer_experts
from heapr.pruning.surgery import remove
from heapr.types import Plan
from tests.experiment import compose_experiment, run_in, write_model, write_texts
from tests.same import ROUNDING, logits
from tests.tiny import tiny_ids, tiny_model

IDS_NW = tiny_ids(2, 12)
KEPT = torch.tensor([True, False, True, True])


def fewer(family: str) -> MoEModel:
    model = MoEModel(tiny_model(family))
    settings = fewer_experts_settings(model.model.config, 3)
    remove(model, Plan(layers={layer.index: KEPT.unsqueeze(1).expand(4, 8) for layer in model.layers}))
    make_fewer_experts(model, settings)
    return model


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek", "gpt_oss", "glm4_moe"])
def test_it_is_the_dense_model_whose_router_cannot_choose_the_removed(family: str) -> None:
    """The slow way: the removed experts' router logits are as low as can be."""
    dense = tiny_model(family)
    for name, module in dense.named_modules():
        if name.endswith(("mlp.gate", "mlp.router")):
            forbid(module)
    model = fewer(family)
    assert all(layer.num_experts == 3 for layer in model.layers)
    torch.testing.assert_close(logits(model.model, IDS_NW), logits(dense, IDS_NW), **ROUNDING)


def forbid(router: torch.nn.Module) -> None:
    """Router logits come from a product with its weight: `F.linear` gets the removed ones' far below all."""
    forward = router.forward

    def without_removed(*arguments: torch.Tensor, **keywords: torch.Tensor) -> object:
        linear = torch.nn.functional.linear
        patch = pytest.MonkeyPatch()
        patch.setattr(torch.nn.functional, "linear", lambda *each: linear(*each).masked_fill(~KEPT, -1e4))
        try:
            return forward(*arguments, **keywords)
        finally:
            patch.undo()

    router.forward = without_removed


def test_a_run_writes_a_stock_checkpoint_with_fewer_experts(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    settings = ["model=hf", f"model.path={tmp_path / 'model'}", "model.dtype=float32", *write_texts(tmp_path)]
    settings += ["evaluation.throughput=null", "evaluation.truth=null", "score=reap", "pruning=layer"]
    summary = run_in(tmp_path, *settings, "pruning.form=fewer_experts", "pruning.ratio=0.36")
    stage = [stage for stage in summary.stages if stage["stage"] == "prune"][-1]
    folder = Path(stage["path"]) / "checkpoint"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert (
        type(model) is Qwen3MoeForCausalLM and model.config.num_experts == 3 and not list(folder.glob("*.py"))
    )
    assert json.loads((folder / "config.json").read_text())["heapr"]["ratio_reached"] == 0.25
    size = sum(parameter.numel() for parameter in model.parameters())
    assert summary.metrics["pruned"]["parameters"] == size
    assert summary.metrics["size"]["flops_removed_ratio"] == pytest.approx(0, abs=0.02)


def test_numbers_of_experts() -> None:
    widths = {0: [8] * 16, 1: [8] * 16}
    assert [choose_num_experts(widths, ratio, 4) for ratio in (0.25, 0.6, 0.75)] == [12, 6, 4]
    with pytest.raises(
        ConfigError,
        match="leaves 3 of 16 experts, and every token is routed to 4; choose a ratio from 0.0625 to 0.75",
    ):
        choose_num_experts(widths, 0.8, 4)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["pruning=global", "score=reap"], "which scope 'global' does not; use pruning=layer"),
        (["pruning=layer", "score=reap", "pruning/repair=expert"], "use pruning/repair=none"),
        (["pruning=layer", "score=reap", "pruning.rounds=2"], "use pruning.rounds=1"),
    ],
)
def test_what_it_cannot_do_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose_experiment("pruning.form=fewer_experts", *overrides)
