"""Experiments whose model is read one decoder layer at a time: the same results, also after kill -9."""

from __future__ import annotations

import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from heapr import placement
from heapr.dry_run import dry_run
from heapr.errors import ConfigError
from heapr.model.load import ModelSource
from heapr.model.shards import Place, Shards
from heapr.model.shelf import Files
from heapr.model.span import Reads
from heapr.pruning.repair import ExpertRepair
from heapr.run_experiment import Summary
from tests.experiment import compose_experiment, run_in, write_model, write_texts
from tests.same import assert_same_files
from tests.tiny import byte_tokenizer, tiny_qwen3_moe

STREAMED, IN_MEMORY = "runtime.stream=true", "runtime.stream=false"
NOT_MEASURED = [f"evaluation.{name}=null" for name in ("throughput", "truth", "fidelity", "efficiency")]


def checkpoint_of(summary: Summary) -> Path:
    (path,) = {stage["path"] for stage in summary.stages if stage["part"] == "checkpoint"}
    return Path(path) / "checkpoint"


def assert_same_metrics(found: Summary, expected: Summary) -> None:
    """All of them, but those that time the machine."""
    for part, metrics in found.metrics.items():
        assert metrics == pytest.approx({name: expected.metrics[part][name] for name in metrics}, rel=1e-6)
    assert found.metrics["dense"].keys() == expected.metrics["dense"].keys()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("tiny", ["pruning/repair=stream", "evaluation.truth.num_groups=2"]),
        (
            "tiny_deepseek",
            ["pruning=expert", "pruning.form=uniform", "pruning/repair=expert", "score=activation"],
        ),
    ],
)
def test_built_in_models_give_the_same_summary_and_checkpoint(
    model: str, options: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = [f"model={model}", *write_texts(tmp_path), "pruning.ratio=0.25", *options]
    in_memory = run_in(tmp_path / "in_memory", *options, IN_MEMORY, "evaluation.throughput=null")
    with caplog.at_level(logging.INFO, logger="heapr"):
        streamed = run_in(tmp_path / "streamed", *options, STREAMED)
    assert_same_metrics(streamed, in_memory)
    assert not any("seconds" in name for name in streamed.metrics["comparison"])
    assert "throughput: left out, because a streamed model waits for the disk" in caplog.text
    assert_same_files(checkpoint_of(streamed), checkpoint_of(in_memory))
    scratch = [*(tmp_path / "streamed" / "outputs" / "artifacts").glob("*/.*.scratch-*")]
    tapes = [*(tmp_path / "streamed" / "outputs" / "artifacts" / ".tapes").iterdir()]
    assert not scratch and not tapes


@pytest.mark.slow
@pytest.mark.parametrize("activations", ["ram", "disk"])
def test_rounds_masks_and_zero_shot_are_the_same(tmp_path: Path, activations: str) -> None:
    texts = [option for option in write_texts(tmp_path) if option != "evaluation.zero_shot=null"]
    model = f"model.path={write_model(tmp_path / 'model')}"
    repair = ["pruning/repair=expert", "pruning.repair.sequential=false", "pruning.rounds=2"]
    options = ["model=hf", model, *texts, *NOT_MEASURED, *repair, "pruning.form=masked", "pruning.ratio=0.4"]
    options += ["model.dtype=float32", "evaluation.zero_shot.limit=4"]
    in_memory = run_in(tmp_path / "in_memory", *options, IN_MEMORY)
    streamed = run_in(tmp_path / "streamed", *options, STREAMED, f"runtime.activations={activations}")
    assert_same_metrics(streamed, in_memory)
    assert any(name.startswith("accuracy/") for name in streamed.metrics["pruned"])
    assert_same_files(checkpoint_of(streamed), checkpoint_of(in_memory))


# Kills its process when so many records of finished work have been made; prints how many layers were read.
KILLED = """
import os, signal, sys
from pathlib import Path
from heapr.model.shelf import Files
from heapr.model.weights import LayerWeights
from tests.experiment import run_in
folder, most, *options = sys.argv[1:]
made, read = [], []
commit, load = Files.commit, LayerWeights.load
def counted_commit(self, **state):
    commit(self, **state)
    made.append(1)
    if len(made) == int(most):
        os.write(1, f"{len(read)}".encode())
        os.kill(os.getpid(), signal.SIGKILL)
def counted_load(self, layer):
    read.append(layer)
    load(self, layer)
Files.commit, LayerWeights.load = counted_commit, counted_load
run_in(Path(folder), *options)
os.write(1, f"{len(read)}".encode())
"""


def run_apart(folder: Path, most: int, options: list[str]) -> tuple[int, int]:
    """An experiment in a process that kills itself; its exit status, and how many layers it read."""
    command = [sys.executable, "-c", KILLED, str(folder), str(most), *options]
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment, check=False)
    return result.returncode, int(result.stdout or -1)


@pytest.mark.slow
def test_work_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    """Killed behind the second layer forwards, behind the last layer backwards, and in the repair of the second
    layer; finished work is not done again, and the result is the same."""
    options = ["model=hf", f"model.path={write_model(tmp_path / 'model', num_hidden_layers=4)}"]
    options += [*write_texts(tmp_path), *NOT_MEASURED, "pruning/repair=stream", "pruning.ratio=0.4"]
    options += ["model.dtype=float32", STREAMED]
    folder, killed = tmp_path / "killed", -signal.SIGKILL
    status, _ = run_apart(folder, 2, options)
    assert status == killed
    # One more forwards, and the last layer backwards: layers 2 and 3. That the model can be streamed is
    # remembered, not that its residual stream can be followed.
    status, num_read = run_apart(folder, 2, options)
    assert (status, num_read) == (killed, 4 + 2)
    # Layers 2, 1 and 0 backwards, the perplexity's 4, and the repair of two.
    status, _ = run_apart(folder, 3 + 2, options)
    assert status == killed
    (scratch,) = (folder / "outputs" / "artifacts").glob("prune/.*.scratch-repair")
    assert len([*scratch.rglob("*-down_proj")]) == 2
    summary = run_in(folder, *options)
    expected = run_in(tmp_path / "whole", *options)
    assert summary.metrics == expected.metrics
    assert_same_files(checkpoint_of(summary), checkpoint_of(expected))


def test_a_tape_of_other_batches_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["model=hf", f"model.path={write_model(tmp_path / 'model')}", *write_texts(tmp_path)]
    options += [*NOT_MEASURED, "model.dtype=float32", STREAMED]
    commit = Files.commit

    def stop(files: Files, **state: object) -> None:
        commit(files, **state)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Files, "commit", stop)
        with pytest.raises(KeyboardInterrupt):
            run_in(tmp_path / "stopped", *options)
    assert [*(tmp_path / "stopped").glob("outputs/artifacts/calibrate/.*.scratch-whole/files/output-*")]
    summary = run_in(tmp_path / "stopped", *options, "calibration.batch_size=3")
    expected = run_in(tmp_path / "whole", *options, "calibration.batch_size=3")
    assert summary.metrics == expected.metrics


def test_a_dry_run_tells_what_calibration_reads_and_puts_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of four layers the last is read once."""
    model = write_model(tmp_path / "model", num_hidden_layers=4)
    options = ["model=hf", f"model.path={model}", "model.dtype=float32", STREAMED]
    options += [text for text in write_texts(tmp_path) if not text.startswith("evaluation")]
    options += [
        "evaluation=none",
        "tracking=none",
        "pruning.save_checkpoint=false",
        "calibration.num_samples=4",
    ]
    # Only the calibration reads: layers are known to depend on the one before.
    monkeypatch.setattr("heapr.placement.check_streamed", lambda *_: None)
    one_before = Reads((frozenset(), *(frozenset({layer}) for layer in range(4))))
    monkeypatch.setattr("heapr.model.passes.reads_of", lambda model: one_before)
    put, on_disk, read_into, read = Files.put, [], Shards._read_into, []

    def weighed(files: Files, name: str, tensor: torch.Tensor) -> torch.Tensor:
        shelved = put(files, name, tensor)
        on_disk.append(sum(path.stat().st_size for path in files.folder.iterdir()))
        return shelved

    def counted(shards: Shards, place: Place, memory: torch.Tensor) -> torch.Tensor:
        read.append(len(memory))
        return read_into(shards, place, memory)

    monkeypatch.setattr(Files, "put", weighed)
    monkeypatch.setattr(Shards, "_read_into", counted)
    plan = dry_run(compose_experiment(f"paths.outputs={tmp_path / 'outputs'}", "dry_run=true", *options))
    run_in(tmp_path, *options)
    assert sum(read) == plan.bytes_read
    assert plan.tape_bytes / 2 < max(on_disk) <= plan.tape_bytes


def test_files_that_change_in_a_run_stop_it_and_what_was_finished_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_model(tmp_path / "model")
    options = ["model=hf", f"model.path={model}", *write_texts(tmp_path), *NOT_MEASURED]
    options += ["model.dtype=float32", "pruning/repair=expert", STREAMED]
    weights, aside = model / "model.safetensors", tmp_path / "aside"
    repair = ExpertRepair.__call__

    def replaced(*arguments: Any, **given: Any) -> Any:
        if not aside.exists():
            weights.rename(aside)
            shutil.copy(aside, weights)
        return repair(*arguments, **given)

    with monkeypatch.context() as patch:
        patch.setattr(ExpertRepair, "__call__", replaced)
        with pytest.raises(
            ConfigError, match=r"model.safetensors' has changed while it was in use; what was"
        ):
            run_in(tmp_path / "stopped", *options)
    aside.rename(weights)
    summary = run_in(tmp_path / "stopped", *options)
    cached = {stage["stage"]: stage["cached"] for stage in summary.stages if stage["stage"] != "evaluate"}
    assert cached["calibrate"] and cached["score"] and not cached["prune"]
    assert summary.metrics == run_in(tmp_path / "whole", *options).metrics


def test_activations_computed_again_change_nothing(tmp_path: Path) -> None:
    options = ["model=hf", f"model.path={write_model(tmp_path / 'model')}", *write_texts(tmp_path)]
    options += [*NOT_MEASURED, "model.dtype=float32"]
    once = run_in(tmp_path / "once", *options)
    again = run_in(tmp_path / "again", *options, "runtime.gradient_checkpointing=true")
    assert again.metrics == once.metrics


@pytest.fixture
def small(tmp_path: Path) -> list[str]:
    """Options of an experiment that would run."""
    model = write_model(tmp_path / "model")
    return ["model=hf", f"model.path={model}", "model.dtype=float32", *write_texts(tmp_path), *NOT_MEASURED]


def test_what_does_not_fit_is_streamed_and_what_does_not_even_then_is_refused(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    model = torch.tensor(0)  # bytes of the weights
    monkeypatch.setattr(placement, "free_memory", lambda device: model.item())
    with pytest.raises(
        ConfigError, match="even one layer at a time takes about .* GB .*, and 0 GB are free on"
    ):
        run_in(tmp_path / "nothing", *small)
    with pytest.raises(
        ConfigError, match="loading the weights takes .* GB are free .*; give runtime.stream=true"
    ):
        run_in(tmp_path / "never", *small, IN_MEMORY)
    monkeypatch.setattr(placement.Placement, "check", lambda *_: None)
    run_in(tmp_path / "streamed", *small)
    lines = [record.getMessage() for record in caplog.records]
    assert any(
        "do not fit into the 0 GB that are free on 'cpu': one layer at a time" in line for line in lines
    )


def test_a_disk_too_small_for_the_tape_is_refused_before_anything_is_computed(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement.Placement, "tape_bytes", 10**18)
    monkeypatch.setattr("heapr.pipeline.collect", lambda *_, **__: pytest.fail("calibration began"))
    with pytest.raises(
        ConfigError, match="activations between the layers need 1e\\+09 GB, .*activations=ram"
    ):
        run_in(tmp_path, *small, STREAMED)


def test_files_are_open_only_while_they_are_read_or_written(tmp_path: Path) -> None:
    """However many shards and activations there are, so that no limit of open files is ever met."""
    tiny_qwen3_moe(num_hidden_layers=8).save_pretrained(tmp_path / "model", max_shard_size="3KB")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    num_shards = len(list((tmp_path / "model").glob("*.safetensors")))
    options = ["model=hf", f"model.path={tmp_path / 'model'}", "model.dtype=float32", *write_texts(tmp_path)]
    options += [
        *NOT_MEASURED,
        "calibration.batch_size=1",
        "pruning/repair=stream",
        "runtime.activations=disk",
    ]
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    spare = 16
    assert num_shards > 2 * spare
    taken = set(map(int, os.listdir("/dev/fd")))
    free = [number for number in range(len(taken) + spare + 1) if number not in taken]
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[spare], before[1]))
    try:
        run_in(tmp_path, *options, STREAMED)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_task_that_generates_is_refused_before_the_model_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = {
        "task": "say", "dataset_path": "json", "output_type": "generate_until", "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "say.jsonl")}, "cache_dir": str(tmp_path / "cache")},
        "doc_to_text": "{{question}}", "doc_to_target": "{{answer}}", "metric_list": [{"metric": "exact_match"}],
    }  # fmt: skip
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "say.yaml").write_text(json.dumps(task))
    (tmp_path / "say.jsonl").write_text(json.dumps({"question": "1 + 1 =", "answer": "2"}))
    texts = [option for option in write_texts(tmp_path) if option != "evaluation.zero_shot=null"]
    options = ["model=hf", f"model.path={write_model(tmp_path / 'model')}", "model.dtype=float32", *texts]
    options += [*NOT_MEASURED, "evaluation.zero_shot.tasks=[say]"]
    options += [f"evaluation.zero_shot.include_path={tmp_path / 'tasks'}", STREAMED]
    monkeypatch.setattr(ModelSource, "stream", lambda *_, **__: pytest.fail("the model was read"))
    with pytest.raises(
        ConfigError, match="zero-shot task 'say' generates text, .* give runtime.stream=false"
    ):
        run_in(tmp_path, *options)


def test_a_family_that_cannot_be_separated_is_refused_by_name(tmp_path: Path) -> None:
    from tests.tiny import SHARED_INSIDE, byte_tokenizer, deep_model

    deep_model("gemma4", **SHARED_INSIDE["gemma4"]).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    options = ["model=hf", f"model.path={tmp_path / 'model'}", "model.dtype=float32", *write_texts(tmp_path)]
    with pytest.raises(
        ConfigError, match="runtime.stream=true: Gemma4ForCausalLM cannot be run layer by layer"
    ):
        run_in(tmp_path, *options, STREAMED)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([STREAMED, "runtime.device_map=auto"], "one layer on one device"),
        (
            [IN_MEMORY, "runtime.last_layers=2"],
            "runtime.last_layers=2 has no effect with runtime.stream=false",
        ),
        (["runtime.last_layers=0"], "runtime.last_layers"),
        ([STREAMED, "runtime.gradient_checkpointing=true"], "no effect with runtime.stream=true"),
        ([IN_MEMORY, "runtime.activations=disk"], "no effect with runtime.stream=false"),
        (["runtime.stream=perhaps"], "runtime.stream='perhaps' is unknown; choose one of true, false, auto"),
        (["runtime.activations=tape"], "choose one of auto, ram, disk"),
    ],
)
def test_options_that_do_not_go_together(
    small: list[str], options: list[str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        run_in(tmp_path, *small, *options)
