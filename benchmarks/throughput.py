"""Prefill of pruned against dense models in one run: does removing FLOPs save time in proportion?

Dense: the model as transformers runs it, with each of its experts implementations, and with heapr's loop.
Pruned: ragged experts after global pruning by heapr's score, so that widths differ as they do in use.

Run:  python benchmarks/throughput.py
      (the model of benchmarks/calibration.py: 218 million parameters, float32)
Out:  medians; throughput of pruned over dense, beside the ratio of their FLOPs on this very batch.
      All take turns, so that a noisy machine disturbs all alike. The efficiency, the first over the second,
      should be at least 0.9.
"""

from __future__ import annotations

import argparse
import copy
import statistics as descriptive
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).parent))
from calibration import build_model

from heapr.calibration.collector import collect
from heapr.model.experts.dispatch import use_heapr_experts
from heapr.model.moe import MoEModel
from heapr.pruning.allocation import allocate
from heapr.pruning.budget import Budget
from heapr.pruning.surgery import remove
from heapr.score.gradient import Heapr

RATIOS = (0.25, 0.5)
DENSE = ("eager", "grouped_mm", "heapr")


@torch.no_grad()
def prefill(model: PreTrainedModel, ids_NW: Tensor) -> None:
    model.model(input_ids=ids_NW, use_cache=False)


def dense_prefill(model: PreTrainedModel, ids_NW: Tensor, implementation: str) -> None:
    if implementation == "heapr":
        with use_heapr_experts(model):
            prefill(model, ids_NW)
    else:
        model.set_experts_implementation(implementation)
        prefill(model, ids_NW)


def flops(model: PreTrainedModel, ids_NW: Tensor) -> int:
    """Of this very batch, routing included; plain matrix products, which torch counts on every device."""
    attention = model.config._attn_implementation
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        prefill(model, ids_NW)
    model.set_attn_implementation(attention)
    return counter.get_total_flops()


def pruned_models(dense: PreTrainedModel) -> dict[str, PreTrainedModel]:
    view = MoEModel(dense)
    generator = torch.Generator().manual_seed(1)
    calibration = list(torch.randint(0, 8192, (4, 512), generator=generator).split(4))
    scores = Heapr()(collect(view, calibration), lambda index: view.layers[index].weights())
    widths = {layer.index: layer.widths for layer in view.layers}
    models = {}
    for ratio in RATIOS:
        pruned = MoEModel(copy.deepcopy(dense))
        remove(pruned, allocate(scores, widths, Budget(ratio=ratio, scope="global", experts_per_token=4)))
        kept = [width for layer in pruned.layers for width in layer.widths]
        print(f"pruned {ratio:.0%}: widths from {min(kept)} to {max(kept)} of 512")
        models[f"pruned {ratio:.0%}"] = pruned.model
    return models


def seconds(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--sequences", type=int, default=8)
    arguments = parser.parse_args()
    dense = build_model()
    ids_NW = torch.randint(0, 8192, (arguments.sequences, 512), generator=torch.Generator().manual_seed(0))
    pruned = pruned_models(dense)
    print(f"prefill of {arguments.sequences} x 512 tokens, {torch.get_num_threads()} threads")
    runs: dict[str, Callable[[], None]] = {}
    for name in DENSE:
        runs[f"dense, {name}"] = lambda name=name: dense_prefill(dense, ids_NW, name)
    for name, model in pruned.items():
        runs[name] = lambda model=model: prefill(model, ids_NW)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(arguments.repeats + 1):
        for name, run in runs.items():
            elapsed = seconds(run)
            if repeat:  # the first round warms up
                times[name].append(elapsed)
    medians = {name: descriptive.median(values) for name, values in times.items()}
    for name, values in times.items():
        speed = ids_NW.numel() / medians[name]
        print(
            f"{name:18} {speed:7.0f} tokens/s   median {medians[name]:.3f} s, {min(values):.3f} to"
            f" {max(values):.3f}"
        )
    dense_flops = flops(dense, ids_NW)
    for name, model in pruned.items():
        saved = dense_flops / flops(model, ids_NW)
        for reference in DENSE:
            turns = zip(times[f"dense, {reference}"], times[name], strict=True)
            faster = descriptive.median(before / after for before, after in turns)
            efficiency = (
                f"{faster:.3f} times as fast at 1/{saved:.3f} of the FLOPs: efficiency {faster / saved:.2f}"
            )
            print(f"{name} against dense, {reference:10}: {efficiency}")


if __name__ == "__main__":
    main()
