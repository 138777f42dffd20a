"""Calibration span by span against one pass, DeepSeekMoE-16B at full size: what the memory of a span costs.

Out: peak memory of both, weights included, and the time of the former over the latter's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.gpu.rows import Row, seconds_in_turns
from benchmarks.gpu.shapes import Shapes, deepseek_model, token_batches
from heapr.calibration.collector import collect
from heapr.measure import StageMeter
from heapr.model.moe import MoEModel
from heapr.model.passes import Way

LAYERS_OF_SPAN = 4


def measure(shapes: Shapes, device: torch.device) -> list[Row]:
    model = deepseek_model(shapes, device)
    view = MoEModel(model)
    ids_NW = torch.cat(token_batches(model, shapes, 2 * shapes.batch_size))
    batches = list(ids_NW.split(max(1, shapes.batch_size // 4)))  # one pass has memory for it
    num_layers = len(view.decoder_layers)
    starts = range(0, num_layers, LAYERS_OF_SPAN)
    spans = [range(start, min(start + LAYERS_OF_SPAN, num_layers)) for start in starts]
    procedures = {
        "one pass": lambda: collect(view, batches),
        "spans": lambda: collect(view, batches, way=Way(spans)),
    }
    peaks = {name: _peak(procedure, device) for name, procedure in procedures.items()}
    seconds = seconds_in_turns(procedures, device, repeats=1)
    rows = [Row(f"streamed: {name}, peak memory", peak / 2**30, "GiB") for name, peak in peaks.items()]
    rows.append(Row("streamed: spans / one pass, seconds", seconds["spans"] / seconds["one pass"], ""))
    return rows


def _peak(procedure: Callable[[], object], device: torch.device) -> int:
    with StageMeter(device) as meter:
        procedure()
    return meter.peak_memory_bytes
