"""Four layers of Qwen3-30B-A3B's shape: (a) the floor, (b) heapr, (c) the published two-stage procedure.

(c) freezes parameters as (b) does and keeps its D x D matrices on the device, where those of four layers fit;
(c, host) keeps them in the host's memory, as those of a whole model have to be. Out: seconds for each batch.
"""

from __future__ import annotations

import torch

from benchmarks.calibration import floor
from benchmarks.gpu.rows import Row, seconds_in_turns
from benchmarks.gpu.shapes import Shapes, layers_model, token_batches
from heapr.calibration.collector import collect
from heapr.evaluation.two_stage import two_stage_scores
from heapr.model.moe import MoEModel


def measure(shapes: Shapes, device: torch.device) -> list[Row]:
    model = layers_model(shapes, device)
    view = MoEModel(model)
    batches = token_batches(model, shapes, shapes.batches_of_layers * shapes.batch_size)
    procedures = {
        "(a)": lambda: (model.set_experts_implementation("grouped_mm"), floor(model, batches)),
        "(b)": lambda: collect(view, batches),
    }
    seconds = seconds_in_turns(procedures, device, repeats=shapes.repeats)
    once = {
        "(c)": lambda: two_stage_scores(view, batches[:1]),
        "(c, host)": lambda: two_stage_scores(view, batches[:1], on_host=True),
    }
    slow = seconds_in_turns(once, device, repeats=1)
    each = {name: value / len(batches) for name, value in seconds.items()} | slow
    rows = [Row(f"layers: {name}, one batch", 1e3 * value, "ms") for name, value in each.items()]
    rows.append(Row("layers: (b)/(a)", each["(b)"] / each["(a)"], ""))
    rows += [Row(f"layers: {name}/(b)", each[name] / each["(b)"], "") for name in slow]
    return rows
