"""Calibration of DeepSeekMoE-16B at full size, random weights made on the device.

(a) the bare model's forward and input-gradient backward, experts by transformers' grouped_mm; (b) the same
with all statistics. Out: seconds, their ratio at the largest batch that both have memory for, peak memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.calibration import floor
from benchmarks.gpu.rows import Row
from benchmarks.gpu.shapes import Shapes, deepseek_model, token_batches
from heapr.calibration.collector import collect
from heapr.measure import StageMeter, wait_for
from heapr.model.moe import MoEModel


def measure(shapes: Shapes, device: torch.device) -> list[Row]:
    model = deepseek_model(shapes, device)
    view = MoEModel(model)
    batches = token_batches(model, shapes, shapes.num_sequences)

    def bare(some: list[Tensor]) -> None:
        model.set_experts_implementation("grouped_mm")
        floor(model, some)

    def ours(some: list[Tensor]) -> None:
        collect(view, some)

    ours(batches[:1])  # warms up, and compiles the kernel
    whole, peak = _timed(ours, batches, device)
    size = shapes.batch_size
    while size > 1 and not _fits(bare, batches[0][:size], device):
        size //= 2
    smaller = [part for batch in batches[:4] for part in batch.split(size)]
    floor_seconds, floor_peak = _timed(bare, smaller, device)
    ours_seconds, _ = _timed(ours, smaller, device)
    return [
        Row("calibration 16B: (b) heapr, all sequences", whole, "s"),
        Row("calibration 16B: (b) peak memory", peak / 2**30, "GiB"),
        Row("calibration 16B: batch that (a) has memory for", size, "sequences"),
        Row("calibration 16B: (a) peak memory", floor_peak / 2**30, "GiB"),
        Row("calibration 16B: (b)/(a)", ours_seconds / floor_seconds, ""),
    ]


def _timed(
    procedure: Callable[[list[Tensor]], None], batches: list[Tensor], device: torch.device
) -> tuple[float, int]:
    """Seconds, and the most bytes that were allocated."""
    wait_for(device)
    with StageMeter(device) as meter:
        started = time.perf_counter()
        procedure(batches)
        wait_for(device)
        seconds = time.perf_counter() - started
    return seconds, meter.peak_memory_bytes


def _fits(procedure: Callable[[list[Tensor]], None], batch: Tensor, device: torch.device) -> bool:
    try:
        procedure([batch])
        wait_for(device)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return False
    return True
