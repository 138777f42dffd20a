"""The next layer is read in a thread: the same results, one layer at a time on the device, errors as they are."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from heapr.calibration.collector import collect
from heapr.errors import ConfigError
from heapr.model.find_model import find_model
from heapr.model.moe import MoEModel
from heapr.model.passes import Way
from heapr.model.read_ahead import ReadAhead
from heapr.model.residency import Streamed
from tests.same import assert_same_statistics
from tests.tiny import byte_tokenizer, tiny_ids, tiny_model

BATCHES = list(tiny_ids(4, 12).split(2))


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("read layer")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model("qwen3_moe", num_hidden_layers=4).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def streamed(folder: Path, *, read_ahead: bool) -> MoEModel:
    source = find_model(str(folder), dtype="float32")
    return source.stream(torch.device("cpu"), read_ahead=read_ahead)


def bytes_read(model: MoEModel) -> int:
    assert isinstance(model.residency, Streamed)
    return model.residency.weights.shards.bytes_read


def test_what_was_begun_is_handed_over_and_nothing_else() -> None:
    readers, may_go = [], threading.Event()

    def read(layer: int) -> str:
        may_go.wait()
        readers.append(threading.current_thread())
        return f"layer {layer}"

    ahead = ReadAhead(read)
    assert ahead.take(0) is None
    ahead.start(1)
    ahead.start(1)
    assert len(threads()) == 1
    may_go.set()
    assert ahead.take(1) == "layer 1"
    assert ahead.take(1) is None
    ahead.start(2)
    ahead.start(3)
    assert ahead.take(2) is None
    assert len(readers) == 3 and threading.main_thread() not in readers and not threads()


def test_calibration_reads_and_finds_the_same(folder: Path) -> None:
    plain, ahead = streamed(folder, read_ahead=False), streamed(folder, read_ahead=True)
    found = [collect(model, BATCHES, way=Way(model.spans, model.shelf())) for model in (plain, ahead)]
    assert_same_statistics(*found, 0)
    assert bytes_read(ahead) == bytes_read(plain)
    assert not threads()


def test_the_next_layer_is_read_meanwhile_in_both_directions(folder: Path) -> None:
    """And no layer but the one that is held is seen in the model."""
    model = streamed(folder, read_ahead=True)
    layers_read = []
    # Forward, and backward: at the turn nobody knows the direction yet.
    for layer in (0, 1, 2, 3, 2, 1, 0):
        before = bytes_read(model)
        with model.hold([layer]):
            for thread in threads():
                thread.join()
            weights = [next(each.parameters()) for each in model.decoder_layers]
            assert [number for number in range(4) if not weights[number].is_meta] == [layer]
        layers_read.append(bytes_read(model) - before)
    one_layer = layers_read[1]
    assert [size / one_layer for size in layers_read] == [2, 1, 1, 0, 2, 1, 0]


def test_an_error_arrives_with_its_own_message_where_the_layer_is_asked_for(folder: Path) -> None:
    model = streamed(folder, read_ahead=True)
    with model.hold([0]):
        for thread in threads():
            thread.join()
    tiny_model("qwen3_moe", seed=1, num_hidden_layers=4).save_pretrained(folder)
    with model.hold([1]):  # read before
        pass
    with (
        pytest.raises(ConfigError, match="model.safetensors' has changed while it was in use"),
        model.hold([2]),
    ):
        pass


def test_no_thread_outlives_an_interrupted_run(folder: Path) -> None:
    model = streamed(folder, read_ahead=True)
    with pytest.raises(KeyboardInterrupt), model.hold([0]):
        raise KeyboardInterrupt
    for thread in threads():
        thread.join(timeout=60)
    assert not threads()
    with model.hold([0]):
        assert not next(model.decoder_layers[0].parameters()).is_meta
