"""A dry run's numbers against published ones, against a real run, and what it says of mistakes and missing
parts."""

from __future__ import annotations

import json
import math
from pathlib import Path

import huggingface_hub
import pytest
from safetensors.torch import load_file

import heapr.dry_run
import heapr.model.find_folder
from heapr.dry_run import DryRun, dry_run
from heapr.errors import ConfigError
from heapr.machine_speed import bytes_per_second
from heapr.model.find_model import find_model
from heapr.one_line_errors import one_line_errors
from heapr.types import Statistics
from tests.architectures import write_config
from tests.experiment import compose_experiment, run_in, write_model, write_texts
from tests.tiny import tiny_qwen3_moe


def plan_in(folder: Path, *overrides: str) -> DryRun:
    return dry_run(
        compose_experiment("tracking=none", "dry_run=true", f"paths.outputs={folder / 'outputs'}", *overrides)
    )


def calibration_in(folder: Path) -> list[str]:
    """Overrides that calibrate on a small text and measure nothing."""
    return [
        *(override for override in write_texts(folder) if override.startswith("calibration")),
        "evaluation=none",
    ]


def no_values(*_: object) -> int:
    raise RuntimeError("Tensor.item() cannot be called on meta tensors")


@pytest.mark.parametrize(
    ("option", "parameters", "shares"),
    [
        ("deepseek_moe_16b_base", 16.4e9, {0.2: 18.3, 0.4: 36.5}),
        ("qwen1_5_moe_a2_7b_chat", 14.3e9, {0.25: 21.8, 0.5: 43.5}),
        ("qwen3_30b_a3b", 30.5e9, {0.25: 23.7, 0.5: 47.5}),
        ("qwen2_57b_a14b", 57.4e9, {0.4: 34.4}),
    ],
)
def test_removed_shares_of_whole_models_are_the_published_ones(
    option: str,
    parameters: float,
    shares: dict[float, float],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(heapr.dry_run, "calibration_flops", no_values)
    folder = write_config(tmp_path / "model", option)
    settings = [f"model={option}", f"model.path={folder}", *calibration_in(tmp_path)]
    for ratio, percent in shares.items():
        plan = plan_in(tmp_path, *settings, f"pruning.ratio={ratio}")
        assert plan.parameters == pytest.approx(parameters, rel=0.003)
        assert round(100 * plan.parameters_removed / plan.parameters, 1) == percent
        assert plan.parameters_removed / plan.expert_parameters == pytest.approx(ratio, abs=1e-6)
        assert plan.weight_bytes == 2 * plan.parameters
        assert plan.activation_bytes is None and plan.calibration_flops is None
        assert any("holds no weights" in note for note in plan.notes)


def test_qwen3_30b_in_all_its_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heapr.dry_run, "calibration_flops", no_values)
    folder = write_config(tmp_path / "model", "qwen3_30b_a3b")
    plan = plan_in(tmp_path, "model=qwen3_30b_a3b", f"model.path={folder}", *calibration_in(tmp_path))
    assert (plan.num_moe_layers, plan.num_layers, plan.num_experts, plan.width, plan.experts_per_token) == (
        48,
        48,
        (128, 128),
        (768,) * 2,
        8,
    )
    assert plan.atomic_experts == 48 * 128 * 768 and plan.atomic_experts_removed == plan.atomic_experts // 4
    assert plan.expert_parameters == plan.atomic_experts * 3 * 2048
    assert plan.statistics_bytes == 48 * 8 * (3 * 128 + 7 * 128 * 768)
    assert plan.matrix_bytes == 48 * 128 * 2048**2 * 4  # 103 GB


def test_without_a_past_the_time_comes_from_work_and_this_machines_speed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ["model=hf", f"model.path={write_model(tmp_path / 'model')}", *calibration_in(tmp_path)]
    # Whatever memory is free: in memory, and nothing computed again.
    in_memory = ["runtime.stream=false", "runtime.gradient_checkpointing=false"]
    measured = plan_in(tmp_path, *settings, *in_memory)
    assert measured.estimated_seconds is not None and measured.estimated_seconds > 0
    shapes = []
    monkeypatch.setattr(heapr.dry_run, "flops_per_second", lambda *what: shapes.append(what[2]) or 1e6)
    monkeypatch.setattr(heapr.dry_run, "bytes_per_second", lambda paths: 1e3)
    plan = plan_in(tmp_path, *settings, *in_memory)
    expected = plan.calibration_flops / 1e6 + plan.weight_bytes / 1e3
    assert plan.estimated_seconds == pytest.approx(expected)
    streamed = plan_in(tmp_path, *settings, "runtime.stream=true")
    # The first of two layers is computed again: a forward pass is half of the FLOPs.
    expected = 1.25 * plan.calibration_flops / 1e6 + streamed.bytes_read / 1e3
    assert streamed.estimated_seconds == pytest.approx(expected)
    tokens = plan.batch_size * plan.sequence_length * plan.experts_per_token / plan.num_experts[0]
    assert shapes[0] == (math.ceil(tokens), 16, plan.width[0])
    assert bytes_per_second([tmp_path / "missing"]) is None
    monkeypatch.setattr(heapr.dry_run, "calibration_flops", no_values)
    assert plan_in(tmp_path, *settings, *in_memory).estimated_seconds is None


def test_a_dry_run_tells_what_a_run_then_does(tmp_path: Path) -> None:
    settings = [
        "model=hf",
        f"model.path={write_model(tmp_path / 'model')}",
        "model.dtype=float32",
        *write_texts(tmp_path),
    ]
    before = plan_in(tmp_path, *settings)
    assert not any(stage.cached for stage in before.stages) and not before.notes
    assert (before.expected_seconds, before.num_expected) == (None, 0)
    assert before.num_missing == len(before.stages)
    summary = run_in(tmp_path, *settings)
    assert [(s.stage, s.what, s.key) for s in before.stages] == [
        (s["stage"], s["what"], s["key"]) for s in summary.stages
    ]

    after = plan_in(tmp_path, *settings)
    assert all(stage.cached for stage in after.stages)
    assert after.parameters == summary.metrics["dense"]["parameters"]
    assert after.weight_bytes == summary.metrics["dense"]["bytes"]
    assert after.parameters - after.parameters_removed == summary.metrics["pruned"]["parameters"]
    folder = next((tmp_path / "outputs" / "artifacts" / "calibrate").glob("*/statistics.safetensors"))
    statistics = Statistics.from_tensors(load_file(folder))
    assert after.statistics_bytes == sum(layer.num_bytes for layer in statistics.layers.values())

    assert (after.expected_seconds, after.estimated_seconds, after.num_missing) == (None, None, 0)

    longer = plan_in(tmp_path, *settings, "calibration.num_samples=1")
    made = json.loads((folder.parent / "manifest.json").read_text())
    share = 1 / made["config"]["num_samples"]
    assert longer.expected_seconds is not None and longer.expected_seconds > share * made["seconds"]
    changed = plan_in(tmp_path, *settings, "pruning.ratio=0.5")
    made = {(stage.stage, stage.what) for stage in changed.stages if not stage.cached}
    made.remove(("prune", "checkpoint"))
    evaluations = (
        "perplexity/text_files pruned",
        "efficiency pruned",
        "routing",
        "fidelity/text_files",
        "throughput",
    )
    assert made == {("prune", ""), *(("evaluate", what) for what in evaluations)}


def test_a_checkpoint_is_to_be_added_to_a_plan_that_is_there(tmp_path: Path) -> None:
    settings = [
        "model=hf",
        f"model.path={write_model(tmp_path / 'model')}",
        "model.dtype=float32",
        *calibration_in(tmp_path),
    ]
    run_in(tmp_path, *settings, "pruning.save_checkpoint=false")
    cached = {
        save: {
            stage.part or stage.stage: stage.cached
            for stage in plan_in(tmp_path, *settings, f"pruning.save_checkpoint={save}").stages
        }
        for save in ("true", "false")
    }
    assert cached["true"] == cached["false"] | {"checkpoint": False} and all(cached["false"].values())


def test_costs_grow_with_samples_and_batches(tmp_path: Path) -> None:
    settings = [
        "model=hf",
        f"model.path={write_model(tmp_path / 'model')}",
        "model.dtype=float32",
        *calibration_in(tmp_path),
    ]
    one = plan_in(tmp_path, *settings, "calibration.num_samples=1")
    six = plan_in(tmp_path, *settings)
    assert one.batch_size == 1 and six.batch_size == 4
    assert one.calibration_flops and six.calibration_flops == 6 * one.calibration_flops
    assert one.activation_bytes and six.activation_bytes == pytest.approx(4 * one.activation_bytes, rel=0.05)


def test_removed_parameters_of_the_uniform_form_are_those_of_its_width(tmp_path: Path) -> None:
    settings = ["model=hf", f"model.path={write_model(tmp_path / 'model')}", *calibration_in(tmp_path)]
    plan = plan_in(
        tmp_path,
        *settings,
        "pruning=expert",
        "pruning.form=uniform",
        "pruning.width_multiple=1",
        "pruning.ratio=0.45",
        "model.dtype=float32",
    )
    assert plan.atomic_experts_removed == 2 * 4 * 4  # 8 -> 4, the width nearest to 4.4
    assert plan.parameters_removed == 2 * 4 * 4 * 3 * 16
    assert plan.notes[-1].startswith(
        "uniform width: ratio 0.45 asks for 4.4 of 8 atomic experts; 4 are kept, which is ratio 0.5"
    )


def test_what_is_not_here_is_noted_and_the_rest_is_told(tmp_path: Path) -> None:
    settings = ["model=hf", f"model.path={write_model(tmp_path / 'model')}", *write_texts(tmp_path)]
    without_test = plan_in(
        tmp_path, *settings, "evaluation.corpora.text_files.paths=[/no/test.txt]", "runtime.device=cuda:99"
    )
    what = [stage.what for stage in without_test.stages if stage.stage == "evaluate"]
    assert what == ["efficiency dense", "truth", "efficiency pruned", "routing", "throughput"]
    assert "cuda:99" in without_test.notes[0] and "'/no/test.txt' does not exist" in without_test.notes[1]
    without_train = plan_in(tmp_path, *settings, "calibration.corpus.paths=[/no/train.txt]")
    assert without_train.stages == [] and without_train.parameters > 0 and len(without_train.notes) == 1


def mistakes(folder: Path) -> dict[str, tuple[list[str], str]]:
    (folder / "empty").mkdir()
    dense = tiny_qwen3_moe().config.to_dict() | {"mlp_only_layers": [0, 1]}
    (folder / "dense").mkdir()
    (folder / "dense" / "config.json").write_text(json.dumps(dense))
    model = write_model(folder / "model")
    return {
        "no config": ([f"model.path={folder / 'empty'}"], "has no config.json"),
        "no folder": (["model.path=/no/such/folder"], "no such folder"),
        "dense": ([f"model.path={folder / 'dense'}"], "has no MoE layer"),
        "offline": (["model.path=someone/some-model"], "the hub cannot be reached"),
        "ratio": ([f"model.path={model}", "pruning.ratio=0.99"], "choose a lower ratio"),
        "length": ([f"model.path={model}", "calibration.sequence_length=100"], "is above the 64 tokens"),
        "key": (
            [f"model.path={model}", "+calibration.corpus.splti=all"],
            "did you mean calibration.corpus.split?",
        ),
        "device": ([f"model.path={model}", "runtime.device=cdua"], "runtime.device='cdua' is unknown"),
    }


def test_a_mistake_is_one_line_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = mistakes(tmp_path)
    capsys.readouterr()
    for overrides, message in cases.values():
        with pytest.raises(SystemExit) as stopped, one_line_errors():
            plan_in(tmp_path, "model=hf", *calibration_in(tmp_path), *overrides)
        error = capsys.readouterr().err
        assert (
            stopped.value.code == 2
            and message in error
            and error.startswith("error: ")
            and error.count("\n") == 1
        )


def test_of_a_hub_model_config_json_alone_is_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_config(tmp_path / "snapshots" / "0a1b", "qwen3_30b_a3b")
    asked: list[list[str]] = []

    def download(hub_id: str, *, allow_patterns: list[str], **_: object) -> str:
        asked.append(allow_patterns)
        return str(folder)

    monkeypatch.setattr(heapr.model.find_folder, "hub_is_reachable", lambda: True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    source = find_model("Qwen/Qwen3-30B-A3B", dtype="bfloat16", config_only=True)
    assert asked == [["config.json"]] and source.identity == {
        "hub": "Qwen/Qwen3-30B-A3B",
        "commit": "0a1b",
        "dtype": "bfloat16",
    }


def test_only_what_is_missing_is_forgiven(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ConfigError, match="is empty"):
        plan_in(tmp_path, "calibration=text_files", f"calibration.corpus.paths=[{tmp_path / 'empty.txt'}]")
