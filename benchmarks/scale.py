"""What published models take, in memory and streamed: the tables of docs/scale.md.

Run:  python benchmarks/scale.py
Out:  Markdown. Sizes and FLOPs follow from shapes, on the meta device; hours from assumed rates, so they
      are estimates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from heapr.model import deepseek_moe
from heapr.model.costs import calibration_flops
from heapr.model.footprint import LOADING_AS_STORED, batch_bytes, footprint
from heapr.model.kernels import Kernels
from heapr.model.moe import MoEModel
from heapr.placement import Placement
from heapr.types import LayerStatistics
from tests.architectures import CONFIGS

GB, TERA = 1e9, 1e12
SAMPLES, LENGTH, BATCH = 128, 2048, 1
FORWARDS_MORE = 1.5  # streamed FLOPs over those in memory: one forward more beside a forward and a backward
CONFIGS_BEYOND: Mapping[str, Mapping[str, Any]] = {
    "Qwen3-235B-A22B": {
        "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 4096, "num_hidden_layers": 94,
        "num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
        "num_experts_per_tok": 8, "moe_intermediate_size": 1536, "intermediate_size": 12288,
    },
    "DeepSeek-V3": {"model_type": "deepseek_v3"},  # transformers' defaults are its sizes
    "gpt-oss-120b": {"model_type": "gpt_oss"},
}  # fmt: skip
PAPER = {
    "DeepSeekMoE-16B": "deepseek_moe_16b_base", "Qwen1.5-MoE-A2.7B": "qwen1_5_moe_a2_7b_chat",
    "Qwen3-30B-A3B": "qwen3_30b_a3b", "Qwen2-57B-A14B": "qwen2_57b_a14b",
}  # fmt: skip


@dataclass(frozen=True)
class Machine:
    """A device with its memory, and rates that are assumed."""

    name: str
    memory: float
    flops_per_second: float
    bytes_per_second: float


MACHINES = (
    Machine("24 GB GPU", 24 * GB, 50 * TERA, 2 * GB),
    Machine("80 GB GPU", 80 * GB, 250 * TERA, 3 * GB),
    Machine("CPU, 64 GB", 64 * GB, 0.5 * TERA, 2 * GB),
)


def model_of(settings: Mapping[str, Any]) -> MoEModel:
    deepseek_moe.register()
    config = AutoConfig.for_model(**{**settings, "dtype": "bfloat16"})
    with torch.device("meta"):
        return MoEModel(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16))


def placed(model: MoEModel, *, is_streamed: bool) -> Placement:
    nowhere = torch.device("meta")
    statistics = [LayerStatistics.zeros(layer.num_experts, layer.width, nowhere) for layer in model.layers]
    return Placement(
        is_streamed=is_streamed,
        on_disk=True,
        num_last=1,
        by_layer=False,
        sizes=footprint(model, BATCH, LENGTH),
        evaluated=footprint(model, BATCH, LENGTH),
        kept=0.75,
        activations=batch_bytes(model, BATCH, LENGTH),
        statistics=sum(layer.num_bytes for layer in statistics),
        kernels=Kernels(()),
        num_batches=SAMPLES // BATCH,
        loading=LOADING_AS_STORED,
        free=0,
        why=None,
    )


def hours(machine: Machine, flops: float, needed: float, streamed: Placement) -> str:
    """Of the calibration: in memory if it fits, else streamed; a dash if not even that fits."""
    if needed <= machine.memory:
        return f"{flops / machine.flops_per_second / 3600:.2g}"
    if sum(streamed.peak_bytes().values()) > machine.memory:
        return "-"
    computing = FORWARDS_MORE * flops / machine.flops_per_second
    reading = streamed.bytes_read / machine.bytes_per_second
    tape = 2 * streamed.tape_bytes / machine.bytes_per_second
    return f"{(computing + reading + tape) / 3600:.2g} streamed"


def main() -> None:
    known = {name: CONFIGS[option] for name, option in PAPER.items()} | dict(CONFIGS_BEYOND)
    print("| model | weights | in memory | streamed | tape on disk | read | FLOPs | hours: ", end="")
    print(" | ".join(machine.name for machine in MACHINES), "|")
    print("|" + "---|" * (7 + len(MACHINES)))
    for name, settings in known.items():
        model = model_of(settings)
        in_memory, streamed = placed(model, is_streamed=False), placed(model, is_streamed=True)
        flops = SAMPLES * calibration_flops(model, LENGTH)
        needed = in_memory.sizes.weights + (in_memory.activations or 0) + in_memory.statistics
        peak = sum(streamed.peak_bytes().values())
        sizes = [in_memory.sizes.weights, needed, peak, streamed.tape_bytes, streamed.bytes_read]
        cells = [f"{size / GB:.3g} GB" for size in sizes]
        cells.append(f"{flops / TERA:,.0f} T")
        cells += [hours(machine, flops, needed, streamed) for machine in MACHINES]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
