"""Ragged experts against dense ones, one layer of Qwen3-30B-A3B's shape.

Widths are those of a real plan of a built-in model (`widths.json`, HEAPr's score, ranked globally), scaled.
Out: the speed-up over transformers' dense grouped_mm, over what was saved: FLOPs in prefill, bytes of the
experts that tokens go to in decode. Beside it the loop, the candidate kernel, and what packing costs in
memory.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from transformers.integrations.moe import grouped_mm_experts_forward

from benchmarks.gpu.rows import Row, seconds_in_turns
from benchmarks.gpu.shapes import Shapes, dense_experts, ragged_experts, routed_tokens
from heapr.model.experts.grouped import run_grouped
from heapr.model.experts.loop import run_experts
from heapr.model.experts.packed import packed_bytes

WIDTHS = Path(__file__).parent / "widths.json"
WIDTH_OF_BUILT_IN = 64


@torch.no_grad()
def measure(shapes: Shapes, device: torch.device) -> list[Row]:
    dense = dense_experts(shapes, device)
    rows = []
    for ratio, widths in plans(shapes).items():
        ragged = ragged_experts(dense, widths)
        own, copies = packed_bytes(ragged)
        rows.append(Row(f"ragged {ratio}: memory of the packed copy / the weights'", copies / own, ""))
        for phase, num_tokens in (("prefill", shapes.prefill), ("decode", shapes.decode)):
            tokens = routed_tokens(shapes, num_tokens, device)
            procedures = {
                "dense": lambda tokens=tokens: grouped_mm_experts_forward(dense, *tokens),
                "dense, ours": lambda tokens=tokens: run_grouped(dense, *tokens),
                "grouped": lambda tokens=tokens, ragged=ragged: run_grouped(ragged, *tokens),
                "loop": lambda tokens=tokens, ragged=ragged: run_experts(ragged, *tokens),
            }
            if device.type == "cuda" and find_spec("triton") is not None:
                from benchmarks.gpu.ragged_kernel import run_persistent

                procedures["kernel"] = lambda tokens=tokens, ragged=ragged: run_persistent(ragged, *tokens)
            seconds = seconds_in_turns(procedures, device, repeats=shapes.repeats, inner=3)
            saved = saved_factor(widths, shapes.width, tokens[1], phase)
            name = f"ragged {ratio}, {phase}"
            ours = seconds["dense, ours"] / seconds["dense"]
            rows.append(Row(f"{name}: dense, ours / transformers'", ours, ""))

            for way in list(procedures)[2:]:
                speed_up = seconds["dense"] / seconds[way]
                rows.append(Row(f"{name}: {way}, speed-up / saved", speed_up / saved, ""))
    return rows


def plans(shapes: Shapes) -> dict[str, list[int]]:
    """Widths of every expert, by the ratio removed: those of the built-in model in turn, scaled."""
    found = {}
    for ratio, widths in json.loads(WIDTHS.read_text()).items():
        scaled = [width * shapes.width // WIDTH_OF_BUILT_IN for width in widths]
        repeated = scaled * -(-shapes.num_experts // len(scaled))
        found[ratio] = repeated[: shapes.num_experts]
    return found


def saved_factor(widths: list[int], dense_width: int, expert_TK: Tensor, phase: str) -> float:
    """How many times as many FLOPs the dense layer takes for these tokens in prefill, how many times as many
    bytes of weights in decode."""
    width_E = torch.tensor(widths, dtype=torch.float64, device=expert_TK.device)
    count_E = torch.bincount(expert_TK.flatten(), minlength=len(widths)).double()
    if phase == "decode":
        count_E = (count_E > 0).double()
    return float(dense_width * count_E.sum() / (width_E * count_E).sum())
