"""Repair and rounds through the pipeline: what is kept, shared, resumed and loaded again."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

import heapr
from heapr import pipeline
from heapr.calibration.collector import collect
from heapr.dry_run import dry_run
from heapr.errors import ConfigError
from heapr.model.moe import MoEModel
from heapr.pruning.allocation import Budget, allocate
from heapr.pruning.repair import JointRepair
from heapr.pruning.surgery import remove_and_repair
from heapr.score.gradient import Fisher
from heapr.sealed import read_sealed, sealed_text
from heapr.tensors_file import save_tensors
from tests.experiment import cached_stages, compose_experiment, run_in, write_model, write_texts
from tests.same import assert_same_model, logits
from tests.tiny import byte_tokenizer, no_weights, tiny_ids, tiny_model, tiny_qwen3_moe

IDS_NW = tiny_ids(num_sequences=2, length=10)
ONLY_PERPLEXITY = "evaluation/evaluators@evaluation=[perplexity]"
BEST = ["score=fisher", "pruning/repair=stream", "pruning.repair.refits=1", "pruning.repair.refit_steps=2"]


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("inputs")
    texts = [
        text
        for text in write_texts(folder)
        if not text.startswith("evaluation.") or "perplexity" in text or "paths" in text
    ]
    return [
        "model=hf",
        f"model.path={write_model(folder / 'model')}",
        "model.dtype=float32",
        ONLY_PERPLEXITY,
        "pruning.ratio=0.4",
        *texts,
    ]


def stages(summary: Any, stage: str, part: str = "") -> list[dict[str, Any]]:
    return [entry for entry in summary.stages if entry["stage"] == stage and entry["part"] == part]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, overrides: list[str]) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("rounds")
    return folder, run_in(folder, *overrides, *BEST, "pruning.rounds=2")


def test_two_rounds_are_two_prunings_one_after_the_other(
    finished: tuple[Path, Any], overrides: list[str]
) -> None:
    """The same by hand: statistics, scores, allocation and repair on the model, then once more on what is
    left."""
    _, summary = finished
    calibrate, prune = stages(summary, "calibrate"), stages(summary, "prune")
    assert [entry["what"] for entry in prune] == ["", "round 2"] and len(calibrate) == len(
        stages(summary, "score")
    ) == 2
    ids_NW = load_file(Path(calibrate[0]["path"]) / "tokens.safetensors")["ids"]
    model = MoEModel(tiny_qwen3_moe())
    for number_removed, left in ((13, 64), (13, 51)):  # round(0.2 * 64), round(0.4 * 64) - 13
        scores = Fisher()(collect(model, ids_NW.split(4)), no_weights)
        budget = Budget(ratio=number_removed / left, scope="global", experts_per_token=2)
        plan = allocate(scores, {layer.index: layer.widths for layer in model.layers}, budget)
        with torch.no_grad():
            remove_and_repair(
                model, plan, JointRepair(target="residual_stream", refits=1, refit_steps=2), ids_NW.split(4)
            )
    pruned = heapr.load_pruned(Path(prune[1]["path"]) / "checkpoint")
    torch.testing.assert_close(logits(pruned, IDS_NW), logits(model.model, IDS_NW), rtol=1e-4, atol=1e-4)


def units_of(summary: Any) -> list[tuple[Path, str]]:
    """Folder and part of everything that a run keeps, in the order in which it was made."""
    return list(dict.fromkeys((Path(entry["path"]), entry["part"]) for entry in summary.stages))


def lose(folder: Path, part: str) -> None:
    """As if it had never been made."""
    if not part:
        shutil.rmtree(folder, ignore_errors=True)
    elif folder.is_dir():
        manifest = read_sealed(folder / "manifest.json")
        for name in manifest["parts"].pop(part)["files"]:
            (folder / name).unlink()
        (folder / "manifest.json").write_text(sealed_text(manifest))


def results_in(folder: Path) -> dict[str, bytes]:
    """Every tensor and metric below a folder, by place; without damaged ones that were moved aside."""
    paths = [
        path
        for path in folder.glob("artifacts/*/[!.]*/**/*")
        if path.suffix == ".safetensors" or path.name in {"metrics.json", "repair.json"}
    ]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


NUM_UNITS = 11
LOST = [set(range(first, NUM_UNITS)) for first in range(NUM_UNITS)]  # killed at every moment
# Anything else that can be missing.
SCATTERED = [set(random.Random(seed).sample(range(NUM_UNITS), 1 + seed % 5)) for seed in range(10)]
LOST += [pytest.param(lost, marks=pytest.mark.slow) for lost in SCATTERED]


@pytest.mark.parametrize("lost", LOST, ids=lambda lost: "-".join(map(str, sorted(lost))))
def test_what_is_made_again_is_what_was_made_at_once(
    tmp_path: Path, finished: tuple[Path, Any], overrides: list[str], lost: set[int]
) -> None:
    """Whatever part of the results is missing: bit for bit the same again, under the same keys."""
    folder, summary = finished
    units = units_of(summary)
    assert len(units) == NUM_UNITS
    shutil.copytree(folder / "outputs", tmp_path / "outputs")
    for number in sorted(lost, reverse=True):
        path, part = units[number]
        lose(tmp_path / path.relative_to(folder), part)
    again = run_in(tmp_path, *overrides, *BEST, "pruning.rounds=2")
    assert again.metrics == summary.metrics
    assert results_in(tmp_path / "outputs") == results_in(folder / "outputs")


def test_a_checkpoint_that_is_asked_for_later_is_the_model_that_was_measured(
    tmp_path: Path, finished: tuple[Path, Any], overrides: list[str]
) -> None:
    run_in(tmp_path, *overrides, *BEST, "pruning.rounds=2", "pruning.save_checkpoint=false")
    later = run_in(tmp_path, *overrides, *BEST, "pruning.rounds=2")
    made = [(entry["stage"], entry["part"]) for entry in later.stages if not entry["cached"]]
    assert made == [("prune", "checkpoint")]
    assert results_in(tmp_path / "outputs") == results_in(finished[0] / "outputs")


def test_a_checkpoint_that_cannot_be_written_costs_neither_plan_nor_repair(
    tmp_path: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As safetensors says that the disk is full."""

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "save_checkpoint", full)
        with pytest.raises(
            ConfigError,
            match="no space left in .*; what was finished is kept: free some space and start again",
        ):
            run_in(tmp_path, *overrides, *BEST)
    again = run_in(tmp_path, *overrides, *BEST)
    cached = {(entry["stage"], entry["part"]): entry["cached"] for entry in again.stages}
    assert cached["prune", ""] and cached["prune", "repair"] and not cached["prune", "checkpoint"]


@pytest.mark.parametrize("form", ["ragged", "masked"])
def test_room_for_the_checkpoint_is_asked_for_before_anything_is_computed(
    tmp_path: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    summary = run_in(tmp_path / "with_room", *overrides, f"pruning.form={form}")
    weights = Path(stages(summary, "prune")[0]["path"]) / "checkpoint" / "model.safetensors"
    num_bytes = sum(tensor.nbytes for tensor in load_file(weights).values())
    usage = shutil.disk_usage(tmp_path)
    for free, is_enough in ((round(1.01 * num_bytes), True), (round(0.99 * num_bytes), False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
        folder = tmp_path / str(free)
        if is_enough:
            run_in(folder, *overrides, f"pruning.form={form}")
            continue
        with pytest.raises(
            ConfigError,
            match=r"the pruned weights need .* GB, and .* has .* GB free; .*pruning.save_checkpoint=false",
        ):
            run_in(folder, *overrides, f"pruning.form={form}")
        assert not list((folder / "outputs").rglob("*.safetensors"))
        run_in(folder, *overrides, f"pruning.form={form}", "pruning.save_checkpoint=false")


def test_a_dry_run_tells_every_step_that_the_run_takes(
    tmp_path: Path, finished: tuple[Path, Any], overrides: list[str]
) -> None:
    told = dry_run(
        compose_experiment(
            "tracking=none", f"paths.outputs={tmp_path}", *overrides, *BEST, "pruning.rounds=2"
        )
    ).stages
    taken = [(entry["stage"], entry["part"], entry["what"], entry["key"]) for entry in finished[1].stages]
    assert [(step.stage, step.part, step.what, step.key) for step in told] == taken and len(
        taken
    ) == NUM_UNITS


def test_second_run_makes_nothing(finished: tuple[Path, Any], overrides: list[str]) -> None:
    folder, summary = finished
    again = run_in(folder, *overrides, *BEST, "pruning.rounds=2")
    assert all(cached_stages(again).values()) and again.metrics == summary.metrics


def test_resumed_after_the_first_round_is_uninterrupted(
    tmp_path: Path, finished: tuple[Path, Any], overrides: list[str]
) -> None:
    """The first round alone is an experiment too; the second then goes on from what the store holds, on a
    model loaded anew."""
    run_in(tmp_path, *overrides, *BEST, "pruning.ratio=0.2", "pruning.save_checkpoint=false")
    resumed = run_in(tmp_path, *overrides, *BEST, "pruning.rounds=2")
    assert [entry["cached"] for entry in stages(resumed, "prune")] == [True, False]
    assert resumed.metrics["pruned"] == pytest.approx(finished[1].metrics["pruned"], rel=1e-5)


def test_lost_statistics_of_a_later_round_are_made_again(
    tmp_path: Path, finished: tuple[Path, Any], overrides: list[str]
) -> None:
    """The model of the round before is then in memory, and is not taken for the last round's."""
    folder, summary = finished
    shutil.copytree(folder / "outputs", tmp_path / "outputs")
    for entry in [stages(summary, "calibrate")[1], *stages(summary, "evaluate")]:
        shutil.rmtree(tmp_path / Path(entry["path"]).relative_to(folder))
    again = run_in(tmp_path, *overrides, *BEST, "pruning.rounds=2")
    assert [entry["cached"] for entry in stages(again, "calibrate")] == [True, False] and cached_stages(
        again
    )["prune"]
    assert again.metrics["pruned"] == pytest.approx(summary.metrics["pruned"], rel=1e-6)


def test_dense_model_and_plan_are_the_checkpoint(finished: tuple[Path, Any], overrides: list[str]) -> None:
    folder = Path(stages(finished[1], "prune")[-1]["path"])
    dense = overrides[1].partition("=")[2]
    assert_same_model(
        heapr.load_pruned(dense, plan=folder / "plan.safetensors"),
        heapr.load_pruned(folder / "checkpoint"),
        tiny_ids(num_sequences=2, length=10),
    )
    with pytest.raises(
        ConfigError,
        match="belongs to a repaired model, but its weights 'repaired.safetensors' are not beside it",
    ):
        heapr.load_pruned(dense, plan=folder / "checkpoint" / "heapr" / "plan.safetensors")


def test_repaired_weights_of_another_plan_are_refused(
    tmp_path: Path, finished: tuple[Path, Any], overrides: list[str]
) -> None:
    """Of the same shapes, as two artifacts of scope layer have them."""
    folder = Path(stages(finished[1], "prune")[-1]["path"])
    shutil.copy(folder / "plan.safetensors", tmp_path)
    save_tensors(
        tmp_path / "repaired.safetensors", load_file(folder / "repaired.safetensors"), {"plan": "0" * 64}
    )
    with pytest.raises(ConfigError, match="repaired.safetensors' was made for another plan"):
        heapr.load_pruned(overrides[1].partition("=")[2], plan=tmp_path / "plan.safetensors")


def test_masked_form_is_the_same_function(
    tmp_path: Path, finished: tuple[Path, Any], overrides: list[str]
) -> None:
    masked = run_in(tmp_path, *overrides, *BEST, "pruning.rounds=2", "pruning.form=masked")
    expected = logits(
        heapr.load_pruned(Path(stages(finished[1], "prune")[-1]["path"]) / "checkpoint"), IDS_NW
    )
    found = logits(heapr.load_pruned(Path(stages(masked, "prune")[-1]["path"]) / "checkpoint"), IDS_NW)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_uniform_form_in_rounds(tmp_path: Path, overrides: list[str]) -> None:
    uniform = ["pruning=expert", "pruning.form=uniform", "pruning.width_multiple=1"]
    summary = run_in(tmp_path, *overrides, *BEST, "pruning.rounds=2", *uniform, "pruning.ratio=0.5")
    model = heapr.load_pruned(Path(stages(summary, "prune")[-1]["path"]) / "checkpoint")
    assert type(model).__name__ == "Qwen3MoeForCausalLM" and model.config.moe_intermediate_size == 4


def test_repair_is_reported(finished: tuple[Path, Any]) -> None:
    for entry in stages(finished[1], "prune"):
        report = json.loads((Path(entry["path"]) / "repair.json").read_text())
        assert report["layers"].keys() == {"0", "1"}
        assert all(layer["error_after"] < layer["error_before"] for layer in report["layers"].values())


def test_card_tells_rounds_and_repair(finished: tuple[Path, Any]) -> None:
    folder = Path(stages(finished[1], "prune")[-1]["path"]) / "checkpoint"
    card, about = (
        (folder / "README.md").read_text(),
        json.loads((folder / "config.json").read_text())["heapr"],
    )
    assert (
        "In 2 rounds, each measured anew. What is left was repaired on the same tokens (`JointRepair`)."
        in card
    )
    assert about["rounds"] == 2 and about["ratio"] == 0.4 and about["repair"]["refits"] == 1


def test_what_is_shared(tmp_path: Path, finished: tuple[Path, Any], overrides: list[str]) -> None:
    """Another repair needs no new statistics of the dense model; a plain run has the key that it always
    had."""
    folder, _ = finished
    other = run_in(
        folder, *overrides, "score=fisher", "pruning/repair=expert", "pruning.save_checkpoint=false"
    )
    assert cached_stages(other) == {"calibrate": True, "score": True, "prune": False, "evaluate": False}
    plain = run_in(folder, *overrides, "score=fisher", "pruning.save_checkpoint=false")
    settings = json.loads((Path(stages(plain, "prune")[0]["path"]) / "manifest.json").read_text())["config"]
    assert settings == {"ratio": 0.4, "scope": "global", "width_multiple": 1, "form": "ragged"}


def test_a_model_whose_stream_repair_cannot_mend_is_refused_before_calibration(
    tmp_path: Path, overrides: list[str]
) -> None:
    """FlexOlmo normalises the experts' output before it is added."""
    tiny_model("flex_olmo").save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(
        ConfigError, match="layer 0 of FlexOlmoForCausalLM .*; give pruning.repair.target=layer_output"
    ):
        run_in(tmp_path, *overrides, f"model.path={tmp_path / 'model'}", *BEST)
    assert not list(tmp_path.glob("outputs/artifacts/*/*/*.safetensors"))
    run_in(
        tmp_path, *overrides, f"model.path={tmp_path / 'model'}", *BEST, "pruning.repair.target=layer_output"
    )
