"""Calibration of DeepSeekMoE-16B at full size, random weights made on the device.

(a) the bare model's forward and input-gradient backward, experts by transformers' grouped_mm; (b) the same
with all statistics. Each runs with the largest batches that it has memory for. Out: seconds of (b) for all
sequences, peak memory, and the ratio of their seconds in batches that both have memory for.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.calibration import floor
from benchmarks.gpu.rows import Row, seconds_in_turns
from benchmarks.gpu.shapes import Shapes, deepseek_model, token_batches
from heapr.calibration.collector import collect
from heapr.measure import StageMeter, wait_for
from heapr.model.moe import MoEModel

Procedure = Callable[[list[Tensor]], None]
SEQUENCES_IN_TURNS = 16


def measure(shapes: Shapes, device: torch.device) -> list[Row]:
    model = deepseek_model(shapes, device)
    view = MoEModel(model)
    ids_NW = torch.cat(token_batches(model, shapes, shapes.num_sequences))

    def bare(batches: list[Tensor]) -> None:
        model.set_experts_implementation("grouped_mm")
        floor(model, batches)

    def ours(batches: list[Tensor]) -> None:
        collect(view, batches)

    size, peak = largest_batch(ours, ids_NW, shapes.batch_size, device)
    bare_size, bare_peak = largest_batch(bare, ids_NW, shapes.batch_size, device)
    whole = seconds_in_turns({"(b)": lambda: ours(list(ids_NW.split(size)))}, device, repeats=1, warm=False)
    both = list(ids_NW[:SEQUENCES_IN_TURNS].split(min(size, bare_size)))
    seconds = seconds_in_turns({"(a)": lambda: bare(both), "(b)": lambda: ours(both)}, device, repeats=2)
    return [
        Row("calibration 16B: (b), all sequences", whole["(b)"], "s"),
        Row("calibration 16B: (b), sequences of a batch", size, ""),
        Row("calibration 16B: (b), peak memory", peak / 2**30, "GiB"),
        Row("calibration 16B: (a), sequences of a batch", bare_size, ""),
        Row("calibration 16B: (a), peak memory", bare_peak / 2**30, "GiB"),
        Row("calibration 16B: (b)/(a)", seconds["(b)"] / seconds["(a)"], ""),
    ]


def largest_batch(procedure: Procedure, ids_NW: Tensor, size: int, device: torch.device) -> tuple[int, int]:
    """The largest batch, at most `size` sequences, that there is memory for, and the bytes that it takes.

    Raises:
        torch.OutOfMemoryError: a single sequence is too much.
    """
    while True:
        try:
            with StageMeter(device) as meter:
                procedure([ids_NW[:size]])
                wait_for(device)
        except torch.OutOfMemoryError:
            if size == 1:
                raise
            size //= 2
        else:
            return size, meter.peak_memory_bytes
        torch.cuda.empty_cache()
