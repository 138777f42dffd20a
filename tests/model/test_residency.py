"""A streamed model has one decoder layer in memory at a time, whatever is done with it."""

from __future__ import annotations

import io
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from heapr.calibration.collector import collect
from heapr.errors import ConfigError
from heapr.model.checkpoint import save_checkpoint
from heapr.model.find_model import find_model
from heapr.model.moe import MoEModel
from heapr.model.passes import Way, final_hidden_states, unchanged
from heapr.model.shelf import Files
from heapr.model.weights import LayerWeights
from heapr.pruning import surgery
from heapr.pruning.repair import ExpertRepair
from heapr.pruning.surgery import _cut, remove_and_repair
from heapr.types import Plan
from tests.same import assert_same_statistics
from tests.tiny import byte_tokenizer, tiny_ids, tiny_model

BATCHES = list(tiny_ids(4, 12).split(2))
KEPT_EF = torch.arange(8) < torch.tensor([[3], [8], [3], [5]])


def in_memory(model: MoEModel) -> list[int]:
    """Decoder layers that have weights in memory."""
    layers = []
    for number, layer in enumerate(model.decoder_layers):
        if not all(parameter.is_meta for parameter in layer.parameters()):
            layers.append(number)
    return layers


@pytest.fixture
def streamed(tmp_path: Path) -> MoEModel:
    tiny_model("qwen3_moe", num_hidden_layers=4).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    return find_model(str(tmp_path / "model"), dtype="float32").stream(torch.device("cpu"))


@pytest.fixture
def seen(streamed: MoEModel, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """What is in memory after each reading of a layer."""
    after: list[list[int]] = []
    load = LayerWeights.load

    def counted(weights: LayerWeights, layer: int) -> None:
        load(weights, layer)
        after.append(in_memory(streamed))

    monkeypatch.setattr(LayerWeights, "load", counted)
    return after


def test_a_layer_that_is_changed_in_memory_is_there_once(
    streamed: MoEModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan(layers={layer.index: KEPT_EF for layer in streamed.layers})
    cut = []
    monkeypatch.setattr(surgery, "_cut", lambda layer, *rest: cut.append(layer.index) or _cut(layer, *rest))
    layer = streamed.layers[1]
    dense = layer.experts
    with streamed.hold([layer.index]):
        surgery.remove(streamed, plan)
        here = layer.experts
        assert cut == [0, 1, 2, 3]
        assert all(weight.is_meta for weight in dense.parameters())
        assert not any(weight.is_meta for weight in here.parameters())
        expected = [weight.clone() for weight in here.parameters()]
    assert layer.experts is here and all(weight.is_meta for weight in here.parameters())
    with streamed.hold([layer.index]):
        assert layer.experts is here and all(map(torch.equal, here.parameters(), expected))


@pytest.mark.parametrize("stop_at", [1, 2, 3, 4])
def test_layers_that_stay_together_change_nothing_and_may_change_where_a_process_stopped(
    streamed: MoEModel, seen: list[list[int]], stop_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    singles, together = streamed.spans, [range(1), range(1, 2), range(2, 4)]
    expected = collect(streamed, BATCHES, way=Way(singles, streamed.shelf()))
    seen.clear()
    assert_same_statistics(collect(streamed, BATCHES, way=Way(together, streamed.shelf())), expected, 0)
    assert seen == [[0], [1], [2], [2, 3], [1], [0]]
    whole = Way([range(4)], Files(tmp_path / "whole", about={}))
    assert_same_statistics(collect(streamed, BATCHES, way=whole), expected, 0)
    commit, records = Files.commit, []

    def stop(files: Files, **state: object) -> None:
        commit(files, **state)
        records.append(state)
        if len(records) == stop_at:
            raise KeyboardInterrupt

    for before, after in ((singles, together), (together, singles)):
        folder = tmp_path / str(len(before))
        records.clear()
        way = Way(before, Files(folder, about={}))
        with monkeypatch.context() as patch:
            patch.setattr(Files, "commit", stop)
            with pytest.raises(KeyboardInterrupt):
                collect(streamed, BATCHES, way=way)
        found = collect(streamed, BATCHES, way=Way(after, Files(folder, about={})))
        assert_same_statistics(found, expected, 0)


def test_one_layer_at_a_time(streamed: MoEModel, seen: list[list[int]], tmp_path: Path) -> None:
    plan = Plan(layers={layer.index: KEPT_EF for layer in streamed.layers})
    dense_experts = [layer.experts for layer in streamed.layers]
    collect(streamed, BATCHES, way=Way(streamed.spans, streamed.shelf()))
    # Forward and backward, after a few tokens have shown which layers read what.
    assert seen[-7:] == [[0], [1], [2], [3], [2], [1], [0]]
    remove_and_repair(streamed, plan, ExpertRepair(), BATCHES)
    list(final_hidden_states(streamed, BATCHES))
    save_checkpoint(streamed, tmp_path / "model", tmp_path / "checkpoint", about={})
    assert all(len(layers) == 1 for layers in seen), seen
    assert in_memory(streamed) == []
    with streamed.hold([1]):
        assert in_memory(streamed) == [1]  # what is left of its experts, and not what they were cut from
        assert all(weight.is_meta for experts in dense_experts for weight in experts.parameters())


def test_a_disk_too_small_for_an_evaluation_is_refused_before_a_layer_is_read(
    streamed: MoEModel, seen: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hidden state of 16 float32 values for each of 48 tokens, for the model and a variant of it."""
    streamed.residency.tapes = tmp_path / "tapes"
    needed = 2 * 48 * 16 * 4
    disk = SimpleNamespace(free=needed)
    monkeypatch.setattr("heapr.model.shelf.shutil.disk_usage", lambda folder: disk)
    assert len(list(final_hidden_states(streamed, BATCHES, [unchanged, unchanged]))) == 2 * 2
    seen.clear()
    disk.free = needed - 1
    with pytest.raises(
        ConfigError, match="activations between the layers need .* GB free; .*activations=ram"
    ):
        list(final_hidden_states(streamed, BATCHES, [unchanged, unchanged]))
    assert seen == []


def test_progress_counts_passes_and_tells_what_was_read(
    streamed: MoEModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = io.StringIO()
    settings = {"file": shown, "mininterval": 0, "miniters": 1, "ncols": 200}
    monkeypatch.setattr("heapr.progress.bar_settings", lambda: settings)
    plan = Plan(layers={layer.index: KEPT_EF for layer in streamed.layers})
    collect(streamed, BATCHES, way=Way(streamed.spans, streamed.shelf()))
    remove_and_repair(streamed, plan, ExpertRepair(), BATCHES)
    list(final_hidden_states(streamed, BATCHES))
    bars = re.split(r"[\r\n]+", shown.getvalue())
    # Two batches, forward through three layers and backward through four; the rest goes forward alone.
    for name, number in {"calibrate": 2 * (3 + 4), "repair": 4, "layers": 2 * 4}.items():
        assert any(re.match(rf"{name}: 100%.* {number}/{number} \[", bar) for bar in bars), name
        assert any(bar.startswith(name) and re.search(r"read \S+ GB, \S+ MB/s", bar) for bar in bars), name
