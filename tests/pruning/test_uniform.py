"""One width everywhere: which one a ratio comes to, that every kernel runs it, and what is refused with which
advice."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from heapr.errors import ConfigError
from heapr.plugins import build
from heapr.pruning.budget import Budget
from heapr.pruning.uniform import choose_uniform_width, uniform_settings
from heapr.steps import experiment_steps
from tests.experiment import compose_experiment, run_in, write_texts
from tests.tiny import byte_tokenizer, tiny_ids, tiny_model


def config_of(family: str, width: int, **changes: object) -> PretrainedConfig:
    return tiny_model(family, moe_intermediate_size=width, **changes).config


def chosen(
    config: PretrainedConfig, ratio: float, multiple: int = 8, dtype: torch.dtype = torch.bfloat16
) -> int:
    budget = Budget(ratio=ratio, scope="expert", experts_per_token=2, width_multiple=multiple)
    return choose_uniform_width(config, {0: [config.moe_intermediate_size] * 4}, budget, dtype)


@pytest.mark.parametrize(
    ("width", "ratio", "expected"),
    [
        (64, 0.3, 48),
        (64, 0.2, 48),
        (64, 0.0, 64),
        (768, 0.3, 536),
        (768, 0.999, 8),
        (12, 0.3, 8),
        (12, 0.0, 12),
    ],
)
def test_a_width_is_the_nearest_multiple_of_8(width: int, ratio: float, expected: int) -> None:
    assert chosen(config_of("qwen3_moe", width), ratio) == expected


def test_shared_experts_are_asked_on_both_sides() -> None:
    """Two shared experts of 1408 are 2816 wide: 704 divides it, 696 and 1056 do not."""
    config = config_of("deepseek_v2", 1408, n_shared_experts=2)
    assert chosen(config, 0.5) == 704
    assert chosen(config, 1 - 699 / 1408) == 704  # 696 is nearer, and cannot be
    assert uniform_settings(config, 704) == {"moe_intermediate_size": 704, "n_shared_experts": 4}


@pytest.mark.parametrize(
    ("config", "ratio", "multiple", "dtype"),
    [
        (("deepseek_v2", 1408, {"n_shared_experts": 2}), 0.25, 8, torch.bfloat16),
        (("deepseek_v2", 64, {"n_shared_experts": 1}), 0.3, 8, torch.float32),
        (("deepseek_v2", 64, {"n_shared_experts": 1}), 0.05, 8, torch.float32),
        (("deepseek_v2", 48, {"n_shared_experts": 3}), 0.3, 16, torch.float32),
        (("qwen3_moe", 64, {}), 0.05, 8, torch.bfloat16),
        (("qwen3_moe", 8, {}), 0.5, 8, torch.float32),
    ],
)
def test_what_a_refusal_advises_works(
    config: tuple[str, int, dict[str, int]], ratio: float, multiple: int, dtype: torch.dtype
) -> None:
    family, width, changes = config
    made = config_of(family, width, **changes)
    with pytest.raises(ConfigError, match="pruning.form=ragged") as caught:
        chosen(made, ratio, multiple, dtype)
    message = str(caught.value)
    assert "\n" not in message
    advised = re.findall(r"pruning.ratio=([\d.]+) \(width (\d+)\)", message)
    assert all(chosen(made, float(other), multiple, dtype) == int(wanted) for other, wanted in advised)
    exact = re.findall(r"pruning.width_multiple=1 \(width (\d+)\)", message)
    assert all(chosen(made, ratio, 1, dtype) == int(wanted) for wanted in exact)
    assert advised or exact


def test_no_width_leaves_all_as_it_is() -> None:
    with pytest.raises(
        ConfigError,
        match=(
            r"asks for a width of 60.8 of 64, and the nearest multiple of 8 removes nothing; choose"
            r" pruning"
        ),
    ):
        chosen(config_of("qwen3_moe", 64), 0.05)


@pytest.mark.parametrize(
    ("ratio", "dtype", "width"), [(0.3, "float32", 45), (0.2, "bfloat16", 51), (0.3125, "bfloat16", 44)]
)
def test_a_width_of_ones_own_that_no_kernel_takes_is_refused_before_calibration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ratio: float, dtype: str, width: int
) -> None:
    monkeypatch.setattr("heapr.pipeline.collect", lambda *_: pytest.fail("calibration began"))
    message = (
        rf"pruning.width_multiple=1 {width}, which transformers' default experts kernel \(grouped_mm\) does"
        rf" not run in {dtype}"
    )
    with pytest.raises(ConfigError, match=message):
        run_in(tmp_path, *overrides_in(tmp_path, dtype), f"pruning.ratio={ratio}", "pruning.width_multiple=1")


def overrides_in(folder: Path, dtype: str) -> list[str]:
    tiny_model("qwen3_moe", moe_intermediate_size=64).save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    model = ["model=hf", f"model.path={folder / 'model'}", f"model.dtype={dtype}"]
    return [
        *model,
        *write_texts(folder),
        "evaluation.throughput=null",
        "pruning=expert",
        "pruning.form=uniform",
    ]


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("ratio", [0.3, pytest.param(0.2, marks=pytest.mark.slow)])
def test_a_run_is_evaluated_and_its_checkpoint_runs_in_plain_transformers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, ratio: float, dtype: str, rounds: int
) -> None:
    caplog.set_level("INFO")
    summary = run_in(
        tmp_path, *overrides_in(tmp_path, dtype), f"pruning.ratio={ratio}", f"pruning.rounds={rounds}"
    )
    assert summary.metrics["pruned"]["perplexity/text_files"] > 0
    assert summary.metrics["size"]["atomic_experts_removed_ratio"] == 0.25
    told = (
        f"uniform width: ratio {ratio} asks for {64 * (1 - ratio):.6g} of 64 atomic experts; 48 are kept,"
        " which is ratio 0.25"
    )
    assert caplog.text.count(told) == 1
    folder = Path([stage["path"] for stage in summary.stages if stage["stage"] == "prune"][-1]) / "checkpoint"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    assert model.config.moe_intermediate_size == 48 and model.config._experts_implementation == "grouped_mm"
    with torch.no_grad():
        assert model(input_ids=tiny_ids(2, 12)).logits.isfinite().all()
    about, card = (
        json.loads((folder / "config.json").read_text())["heapr"],
        (folder / "README.md").read_text(),
    )
    assert (about["ratio"], about["width"], about["ratio_reached"], about["width_multiple"]) == (
        ratio,
        48,
        0.25,
        8,
    )
    assert (
        "25.0% of its routed atomic experts removed" in card
        and f"ratio {ratio}, scope `expert`, form `uniform`, one width of 48" in card
    )


def test_to_ask_for_nothing_is_to_ask_for_8_with_one_width_and_for_1_without(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text")

    def key(*overrides: str) -> str:
        config = compose_experiment(
            "calibration=text_files", f"calibration.corpus.paths=[{tmp_path}/a.txt]", *overrides
        )
        corpus = build(config.calibration.corpus, "calibration.corpus")
        return (
            experiment_steps(config, corpus, [], model={"sha256": "0"}, machine={}).last("prune").origin.key
        )

    uniform = ("pruning=expert", "pruning.form=uniform")
    assert (
        key(*uniform)
        == key(*uniform, "pruning.width_multiple=8")
        != key(*uniform, "pruning.width_multiple=1")
    )
    assert (
        key()
        == key("pruning.width_multiple=1")
        == key("pruning.width_multiple=null")
        != key("pruning.width_multiple=8")
    )
