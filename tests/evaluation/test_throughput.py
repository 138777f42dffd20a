"""Throughput: what is timed, in which order, and how turns become metrics; on a clock of our own."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from transformers import PreTrainedModel

from heapr.evaluation import throughput as module
from heapr.evaluation.throughput import Throughput
from heapr.measure import machine
from heapr.model.moe import MoEModel
from tests.evaluation.material import CPU, material_of
from tests.tiny import tiny_ids

SIZES = {"prompt_length": 10, "new_tokens": 2, "batch_size": 3}


class Clock:
    """Every reading of the cache takes as long as its model is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.seen = 0.0, []
        self.seconds = {}
        read = module._read

        def timed(model, ids_NW, cache=None):
            number_of_parameters = sum(parameter.numel() for parameter in model.model.parameters())
            self.seen.append(
                (number_of_parameters, tuple(ids_NW.shape), model.model.get_experts_implementation()[""])
            )
            self.now += self.seconds.get(number_of_parameters, 1.0) * ids_NW.shape[1]
            return read(model, ids_NW, cache)

        monkeypatch.setattr(module, "_read", timed)
        monkeypatch.setattr(module.time, "perf_counter", lambda: self.now)


def test_metrics_follow_the_clock(causal_lm: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    material = material_of(causal_lm, tiny_ids(2, 12))
    pruned = material.dense_and_pruned()[1]
    clock = Clock(monkeypatch)
    clock.seconds = {sum(p.numel() for p in pruned.model.parameters()): 0.5}
    metrics = Throughput(**SIZES, repeats=3)(material).metrics
    assert metrics["prefill_seconds/dense"] == 10 and metrics["prefill_seconds/pruned"] == 5
    assert (
        metrics["prefill_tokens_per_second/dense"] == 3 * 10 / 10
        and metrics["prefill_tokens_per_second/pruned"] == 6
    )
    assert metrics["decode_seconds/dense"] == 1 and metrics["decode_tokens_per_second/pruned"] == 3 / 0.5
    assert metrics["decode_speedup"] == metrics["prefill_speedup"] == 2
    assert metrics["decode_seconds_iqr/dense"] == 0


def test_turns_go_forwards_and_backwards(causal_lm: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    material = material_of(causal_lm, tiny_ids(2, 12))
    Throughput(**SIZES, repeats=2)(material)
    prompts = [(number, forward) for number, shape, forward in clock.seen if shape == (3, 10)]
    dense, pruned = max(n for n, _ in prompts), min(n for n, _ in prompts)
    default, mine, cut = (dense, "grouped_mm"), (dense, "heapr"), (pruned, "heapr")
    assert prompts[3:] == [default, mine, cut, cut, mine, default]  # after the pass that measures memory
    assert [shape for _, shape, _ in clock.seen[:3]] == [(3, 10), (3, 1), (3, 1)]


def test_medians_and_quartiles() -> None:
    seconds = {
        "dense": torch.tensor([1.0, 2, 3, 4, 100]).double(),
        "pruned": torch.tensor([1.0, 1, 1, 4, 25]).double(),
    }
    seconds["dense_default"] = seconds["dense"] / 2
    metrics = module._timings("decode", 8, seconds)
    assert metrics["decode_seconds/dense"] == 3 and metrics["decode_tokens_per_second/dense"] == 8 / 3
    assert metrics["decode_seconds_iqr/dense"] == 2
    assert metrics["decode_speedup"] == 2  # the median of 1, 2, 3, 1, 4: turn by turn
    assert metrics["decode_speedup_default"] == 1  # a ragged model's own way is the same loop
    metrics = module._timings("decode", 8, {**seconds, "pruned_default": seconds["pruned"] / 4})
    assert (metrics["decode_speedup"], metrics["decode_speedup_default"]) == (2, 4)


def test_peak_memory_is_weights_cache_and_what_is_computed(causal_lm: PreTrainedModel) -> None:
    material = material_of(causal_lm, tiny_ids(2, 12))
    metrics = Throughput(**SIZES, repeats=1)(material).metrics
    dense, pruned = (4 * sum(p.numel() for p in m.model.parameters()) for m in material.dense_and_pruned())
    cache = 2 * 2 * 3 * 12 * 8 * 4  # keys and values, layers, sequences, tokens, head_dim, bytes
    saved = metrics["decode_peak_memory_bytes/dense"] - metrics["decode_peak_memory_bytes/pruned"]
    assert saved == pytest.approx(dense - pruned, rel=0.05)
    assert (
        dense + cache < metrics["decode_peak_memory_bytes/dense"] < metrics["prefill_peak_memory_bytes/dense"]
    )


def test_the_machine_is_part_of_the_record(causal_lm: PreTrainedModel) -> None:
    details = Throughput(**SIZES, repeats=1)(material_of(causal_lm, tiny_ids(2, 12))).details
    assert (
        details["machine"] == machine(CPU)
        and details["machine"]["device"] == "cpu"
        and details["dtype"] == "float32"
    )
    assert len(details["seconds"]["pruned"]["decode"]) == 1
    assert details["experts_forward"] == {
        "dense_default": {"": "grouped_mm"},
        "dense": {"": "heapr"},
        "pruned": {"": "heapr"},
    }


def test_a_stock_model_also_runs_its_own_best_way(causal_lm: PreTrainedModel) -> None:
    material = material_of(causal_lm, tiny_ids(2, 12))
    dense = material.model()
    stock = dataclasses.replace(
        material, dense_and_pruned=lambda: (dense, MoEModel(copy.deepcopy(dense.model)))
    )
    found = Throughput(**SIZES, repeats=1)(stock)
    assert found.details["experts_forward"]["pruned_default"] == {"": "grouped_mm"}
    assert found.metrics["prefill_tokens_per_second/pruned_default"] > 0


def test_short_texts_are_repeated(causal_lm: PreTrainedModel) -> None:
    material = material_of(causal_lm, tiny_ids(1, 7))
    text = Throughput(**SIZES, repeats=1)._text(material)
    assert text.shape == (3, 12)
    assert torch.equal(text.flatten(), tiny_ids(1, 7).flatten().repeat(6)[:36])


@pytest.mark.gpu
def test_on_a_gpu(causal_lm: PreTrainedModel) -> None:
    device = torch.device("cuda")
    material = material_of(causal_lm.to(device), tiny_ids(2, 12))
    metrics = Throughput(**SIZES, repeats=2)(material).metrics
    assert metrics["prefill_peak_memory_bytes/dense"] > metrics["prefill_peak_memory_bytes/pruned"] > 0
    assert metrics["decode_tokens_per_second/pruned"] > 0
