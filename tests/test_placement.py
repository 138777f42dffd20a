"""Where weights and activations go, and what that takes."""

from __future__ import annotations

import resource
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from heapr import placement
from heapr.errors import ConfigError
from heapr.model import footprint, kernels
from heapr.model.shelf import Memory
from heapr.placement import Placement, choose_placement
from heapr.prepare import find_source
from heapr.ranks import ONE_PROCESS
from heapr.schema import ExperimentConfig
from tests.experiment import compose_experiment

CPU = torch.device("cpu")


@pytest.fixture
def config() -> ExperimentConfig:
    return compose_experiment("model=tiny", "calibration.batch_size=2", "calibration.num_samples=5")


def chosen(config: ExperimentConfig, free: int, monkeypatch: pytest.MonkeyPatch) -> Placement:
    monkeypatch.setattr(placement, "free_memory", lambda device: free)
    return choose_placement(config, find_source(config.model), CPU, ONE_PROCESS)


def test_footprint_is_that_of_the_loaded_model(
    config: ExperimentConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = chosen(config, 10**12, monkeypatch)
    model = find_source(config.model).load(CPU)
    in_layers = [sum(p.nbytes for p in layer.parameters()) for layer in model.decoder_layers]
    assert place.sizes.weights == sum(parameter.nbytes for parameter in model.model.parameters())
    assert place.sizes.layer == max(in_layers) and place.sizes.beside == place.sizes.weights - sum(in_layers)
    assert place.sizes.hidden == 2 * config.calibration.sequence_length * 128 * 4
    assert place.num_batches == 3 and place.tape_bytes == (4 + 2) * 3 * place.sizes.hidden


def test_auto_takes_the_first_that_fits(config: ExperimentConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    roomy = chosen(config, 10**12, monkeypatch)
    assert (roomy.is_streamed, roomy.by_layer, roomy.why) == (False, False, None)
    monkeypatch.setattr(placement, "loading_factor", lambda *_: 1.0)
    weights = roomy.sizes.weights + roomy.statistics
    tight = chosen(config, weights + 10**6, monkeypatch)
    assert (tight.is_streamed, tight.by_layer) == (False, True) and "gradient_checkpointing" in str(tight.why)
    small = chosen(config, weights - 1, monkeypatch)
    assert small.is_streamed and not small.by_layer and "one layer at a time" in str(small.why)
    spread = replace(config, runtime=replace(config.runtime, device_map="auto"))
    assert not chosen(spread, 0, monkeypatch).is_streamed


def test_what_does_not_fit_while_it_is_loaded_is_streamed(
    config: ExperimentConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_stored = replace(config, model=replace(config.model, dtype="bfloat16"))
    converted = replace(config, model=replace(config.model, dtype="float32"))
    weights = chosen(converted, 10**12, monkeypatch).sizes.weights
    assert chosen(as_stored, 10**12, monkeypatch).loading == 1.2
    small = chosen(converted, int(1.7 * weights), monkeypatch)
    assert small.is_streamed and "1.8 times that while they are loaded" in str(small.why)
    assert not chosen(converted, int(1.9 * weights) + small.statistics, monkeypatch).is_streamed
    never = replace(small, is_streamed=False)
    with pytest.raises(ConfigError, match="loading the weights takes about .* 1.8 times their size"):
        never.check(CPU)
    assert footprint.loading_factor(torch.device("cuda"), None, torch.bfloat16) == 1.0


def test_parts_add_up_and_the_tape_counts_in_memory_alone(
    config: ExperimentConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    streamed = chosen(replace(config, runtime=replace(config.runtime, stream=True)), 10**12, monkeypatch)
    in_ram = replace(streamed, on_disk=False)
    assert sum(in_ram.peak_bytes().values()) - sum(streamed.peak_bytes().values()) == streamed.tape_bytes
    cut = round(streamed.kept * streamed.sizes.experts)
    expected = {
        "repair": cut + 2 * 3 * streamed.sizes.hidden,
        "checkpoint": cut + cut - cut // 3,
        "evaluate pruned": cut + streamed.peak_bytes("evaluate dense")["a batch in it"],
    }
    always = streamed.sizes.beside + streamed.sizes.layer + footprint.BUFFERS
    for stage, size in expected.items():
        assert sum(streamed.peak_bytes(stage).values()) == always + size
    dense = sum(streamed.peak_bytes("evaluate dense").values())
    roomy_for_dense = replace(streamed, free=dense)
    roomy_for_dense.check(CPU, ["evaluate dense"])
    with pytest.raises(ConfigError, match="to evaluate pruned .*the layer after surgery"):
        roomy_for_dense.check(CPU, ["evaluate dense", "evaluate pruned"])
    assert streamed.bytes_read < 2 * streamed.sizes.weights
    with pytest.raises(ConfigError, match="are more than the 60000 files"):
        replace(streamed, num_batches=10**6, free=10**12).check(CPU)


def test_layers_that_stay_together_are_read_and_run_once(
    config: ExperimentConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = replace(config.runtime, stream=True)
    one = chosen(replace(config, runtime=runtime), 10**12, monkeypatch)
    three = chosen(replace(config, runtime=replace(runtime, last_layers=3)), 10**12, monkeypatch)
    assert (one.work_ratio, three.work_ratio) == (1 + 3 / 8, 1 + 1 / 8)
    assert three.tape_bytes == (2 + 2) * 3 * three.sizes.hidden
    in_layers = one.sizes.weights - one.sizes.beside
    assert one.bytes_read - three.bytes_read == in_layers // 2
    assert three.peak_bytes()["3 layers"] == 3 * one.sizes.layer
    assert three.peak_bytes("repair") == one.peak_bytes("repair")
    spans = three.way(SimpleNamespace(spans=one_by_one(4)), Memory).spans
    assert list(spans) == [range(1), range(1, 4)]
    every = chosen(replace(config, runtime=replace(runtime, last_layers=9)), 10**12, monkeypatch)
    assert every.num_last == 4 and every.bytes_read == every.sizes.weights


def one_by_one(number: int) -> list[range]:
    return [range(layer, layer + 1) for layer in range(number)]


def test_a_gpu_needs_memory_of_the_cpu_to_read_ahead(
    config: ExperimentConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = chosen(replace(config, runtime=replace(config.runtime, stream=True)), 10**12, monkeypatch)
    needed = 2 * place.sizes.layer
    monkeypatch.setattr(placement, "free_memory", lambda device: needed if device == CPU else 0)
    place.check(torch.device("cuda"))
    needed -= 1
    place.check(CPU)
    with pytest.raises(ConfigError, match="reading a layer while 'cuda' computes takes .* GB are free"):
        place.check(torch.device("cuda"))
    needed += place.tape_bytes
    with pytest.raises(ConfigError, match="give runtime.activations=disk"):
        replace(place, on_disk=False).check(torch.device("cuda"))


def test_half_precision_leaves_kernels_behind_on_a_cpu_that_compiles_them(
    config: ExperimentConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = replace(config, model=replace(config.model, dtype="bfloat16"))
    for name in kernels.CAPACITIES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(kernels, "_compiles", lambda dtype: dtype == torch.bfloat16)
    assert chosen(config, 10**12, monkeypatch).kernels.num_bytes(100) == 0
    assert kernels.kernels_of(torch.device("cuda"), torch.bfloat16, is_streamed=False).capacities == ()
    in_memory = chosen(half, 10**12, monkeypatch)
    streamed = chosen(replace(half, runtime=replace(half.runtime, stream=True)), 10**12, monkeypatch)
    # 4 layers of 16 experts with 2 products each, for each of 3 batches and for all tokens.
    assert in_memory.peak_bytes("repair")["kernels"] == 2 * kernels.KERNEL * (4 * 16 * 2 * (3 + 1))
    assert "kernels" not in in_memory.peak_bytes("checkpoint")
    # At most 5 times the mean number of tokens, forward and backward; fewer are kept.
    assert in_memory.peak_bytes("calibrate")["kernels"] == 2 * kernels.KERNEL * min(1024, 4 * 4 * 16 * 3)
    assert streamed.peak_bytes("calibrate")["kernels"] == 2 * kernels.KERNEL * 128
    few = replace(in_memory, sizes=replace(in_memory.sizes, expert_tokens=10))
    assert few.peak_bytes("calibrate")["kernels"] == 2 * kernels.KERNEL * (4 * 5 * 10)
    monkeypatch.setenv(kernels.CAPACITIES[0], "7")
    assert kernels.kernels_of(CPU, torch.bfloat16, is_streamed=True).num_bytes(1000) == 135 * kernels.KERNEL


def test_free_memory_is_what_limits_leave(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert 0 < footprint.free_memory(CPU) < 2**50
    limits = {resource.RLIMIT_DATA: (10**9, 10**9), resource.RLIMIT_AS: (resource.RLIM_INFINITY,) * 2}
    monkeypatch.setattr(resource, "getrlimit", limits.__getitem__)
    assert 0 <= footprint.free_memory(CPU) < 10**9
    limits[resource.RLIMIT_DATA] = limits[resource.RLIMIT_AS]
    for name, content in {
        "memory.max": "5000000\n", "memory.current": "4000000\n", "memory.stat": "anon 1\ninactive_file 500\n",
    }.items():  # fmt: skip
        (tmp_path / name).write_text(content)
    monkeypatch.setattr(footprint, "CGROUP", tmp_path)
    assert footprint.free_memory(CPU) == 1_000_500
