"""Repair of one layer of Qwen3-30B-A3B's shape: `joint`, `full` and `stream`, as conf/pruning/repair says.

Half of the atomic experts are gone, by the widths of a real plan. Out: seconds, memory beside the weights,
and the share of the squared error that is left.
"""

from __future__ import annotations

import copy
import time

import torch

from benchmarks.gpu.ragged import plans
from benchmarks.gpu.rows import Row
from benchmarks.gpu.shapes import Shapes, dense_experts, routed_tokens
from heapr.measure import WorkingMemory, wait_for
from heapr.model.expert_inputs import ExpertInputs
from heapr.model.experts.layout import Experts, matrices_of
from heapr.model.experts.ragged import RaggedExperts
from heapr.model.stream import StreamTarget
from heapr.pruning.activations import layer_output
from heapr.pruning.repair import JointRepair


@torch.no_grad()
def measure(shapes: Shapes, device: torch.device) -> list[Row]:
    dense = dense_experts(shapes, device)
    ragged = _first_atomic_experts(dense, plans(shapes)["0.5"])
    inputs = ExpertInputs(*routed_tokens(shapes, shapes.repair_tokens, device))
    stream_TD = torch.randn(inputs.hidden_TD.shape, device=device)
    target = StreamTarget.between(stream_TD + layer_output(dense, inputs), stream_TD, 1.0)
    ways = {
        "joint": (JointRepair(), None),
        "full": (JointRepair(refits=2), None),
        "stream": (JointRepair(refits=2, target="residual_stream"), target),
    }
    rows = []
    for name, (repair, wanted) in ways.items():
        after = copy.deepcopy(ragged)
        with WorkingMemory(device) as memory:
            started = time.perf_counter()
            found = repair(dense, after, inputs, target=wanted)
            wait_for(device)
            seconds = time.perf_counter() - started
            num_bytes = memory.take_peak()
        rows.append(Row(f"repair {name}", seconds, "s"))
        rows.append(Row(f"repair {name}: memory", num_bytes / 2**30, "GiB"))
        rows.append(Row(f"repair {name}: error left", found.error_after / found.error_before, ""))
    return rows


def _first_atomic_experts(dense: Experts, widths: list[int]) -> RaggedExperts:
    """Of each expert as many as its width says."""
    ragged = RaggedExperts(dense, widths).requires_grad_(False)
    layout = ragged.layout
    for left, matrices, width in zip(matrices_of(ragged), matrices_of(dense), widths, strict=True):
        own_F = torch.arange(matrices.down_DF.shape[1], device=matrices.down_DF.device) < width
        left.inputs_GD.copy_(matrices.inputs_GD[layout.rows(own_F)])
        left.down_DF.copy_(matrices.down_DF[:, :width])
    return ragged
