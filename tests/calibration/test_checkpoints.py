"""Checkpoints of calibration: whoever goes on from one finds the same statistics, bit for bit."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from heapr.calibration.checkpoints import Checkpoints
from heapr.calibration.collector import collect
from heapr.model.moe import MoEModel
from heapr.model.passes import Way
from heapr.model.shelf import Files
from heapr.types import Statistics

ABOUT = {"work": "this"}


class StopError(Exception):
    """In place of a crash."""


def stopping(batches: list[Tensor], after: int) -> Iterator[Tensor]:
    """The first batches, and then the crash."""
    yield from batches[:after]
    raise StopError


def assert_equal_bits(found: Statistics, expected: Statistics) -> None:
    assert (found.loss_sum, found.num_tokens) == (expected.loss_sum, expected.num_tokens)
    assert found.num_predicted_tokens == expected.num_predicted_tokens
    for index, layer in expected.layers.items():
        for name, tensor in layer.items():
            assert torch.equal(getattr(found.layers[index], name), tensor), name


@pytest.mark.parametrize("by_layer", [False, True])
def test_statistics_do_not_depend_on_when_calibration_was_interrupted(
    model: MoEModel, ids_NW: Tensor, tmp_path: Path, by_layer: bool
) -> None:
    """After each batch in turn, and twice in one calibration."""
    num_layers = len(model.decoder_layers)
    way = Way([range(layer, layer + 1) for layer in range(num_layers)], together=False) if by_layer else None
    batches = list(ids_NW.split(2))
    expected = collect(model, batches, way=way)
    for first in range(len(batches)):
        folder = tmp_path / str(first)
        for stop in (first, first + 1):
            checkpoints = Checkpoints(Files(folder, ABOUT), 0)
            with pytest.raises(StopError):
                collect(model, stopping(batches, stop), way=way, checkpoints=checkpoints)
        computed: list[int] = []

        def count(num_tokens: int, loss: float, computed: list[int] = computed) -> None:
            computed.append(num_tokens)

        checkpoints = Checkpoints(Files(folder, ABOUT), 0)
        found = collect(model, batches, way=way, on_batch=count, checkpoints=checkpoints)
        assert_equal_bits(found, expected)
        assert len(computed) == len(batches) - first - 1


def test_a_checkpoint_is_made_when_the_last_one_is_long_enough_ago(
    model: MoEModel, ids_NW: Tensor, tmp_path: Path
) -> None:
    # Begins at 0; batches end at 3, 7, 12 (which is saved, until 13), 20 and 23 (saved).
    batches = list(ids_NW.split(1))[:5]
    for stop, done in ((2, 0), (4, 3), (5, 5)):
        folder = tmp_path / str(stop)
        times = iter([0.0, 3.0, 7.0, 12.0, 13.0, 20.0, 23.0, 24.0])
        checkpoints = Checkpoints(Files(folder, ABOUT), 10, lambda times=times: next(times))
        collect(model, batches[:stop], checkpoints=checkpoints)
        state = Files(folder, ABOUT).state
        assert state.get("totals", {}).get("num_batches", 0) == done
        assert len(list(folder.iterdir())) == (1 + len(model.layers) if done else 0)


def test_a_full_disk_costs_the_checkpoint_and_not_the_calibration(
    model: MoEModel, ids_NW: Tensor, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    batches = list(ids_NW.split(2))
    expected = collect(model, batches)
    files = Files(tmp_path, ABOUT)
    put, left = files.put, iter(range(100))

    def refuse_sometimes(name: str, tensor: Tensor) -> Tensor:
        if next(left) in {1, 3}:  # the second layer of the first batch, and of the second
            raise OSError(28, "No space left on device")
        return put(name, tensor)

    monkeypatch.setattr(files, "put", refuse_sometimes)
    with caplog.at_level(logging.WARNING, logger="heapr"):
        assert_equal_bits(collect(model, batches, checkpoints=Checkpoints(files, 0)), expected)
    assert caplog.text.count("could not be written: No space left on device") == 2
    # What is there belongs to the last batch.
    assert Files(tmp_path, ABOUT).state["totals"]["num_batches"] == len(batches)
    assert_equal_bits(collect(model, batches, checkpoints=Checkpoints(Files(tmp_path, ABOUT), 0)), expected)


def test_a_checkpoint_of_other_work_or_a_damaged_one_is_not_used(
    model: MoEModel, ids_NW: Tensor, tmp_path: Path
) -> None:
    batches = list(ids_NW.split(2))
    expected = collect(model, batches)
    for about, damage in (({"work": "other"}, False), (ABOUT, True)):
        checkpoints = Checkpoints(Files(tmp_path, ABOUT), 0)
        with pytest.raises(StopError):
            collect(model, stopping(batches, 2), checkpoints=checkpoints)
        if damage:
            file = next(tmp_path.glob("statistics-*"))
            content = bytearray(file.read_bytes())
            content[100] ^= 1
            file.write_bytes(content)
        files = Files(tmp_path, about)
        assert not files.state
        assert_equal_bits(collect(model, batches, checkpoints=Checkpoints(files, 1e9)), expected)
