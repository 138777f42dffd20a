"""Time and memory of calibration, in one run on one machine:

    (a) floor:     the bare model's forward and input-gradient backward, experts by transformers' grouped_mm
    (b) heapr:     the same with the statistics collected (heapr.calibration.collector)
    (c) two-stage: the published procedure with frozen parameters, as (b): a D x D matrix per expert from
                   a first forward and backward, scores from a second forward
    (d) published: the same with the gradients of all parameters, which the published code computes

Run:  python benchmarks/calibration.py
      (make bench; about 218 million parameters in float32, 4 GiB of memory)
Out:  medians, and the ratios (b)/(a), (c)/(b) and (d)/(b). All take turns, so that a noisy machine
      disturbs all alike.
"""

from __future__ import annotations

import argparse
import statistics as descriptive
import time
from collections.abc import Callable
from dataclasses import fields

import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from heapr.calibration.collector import collect
from heapr.evaluation.two_stage import two_stage_scores
from heapr.model.loss import frozen_parameters, summed_loss_backward
from heapr.model.moe import MoEModel
from heapr.score.gradient import Heapr
from heapr.types import LayerStatistics


def build_model() -> PreTrainedModel:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=8192, hidden_size=1024, num_hidden_layers=4,
        num_attention_heads=16, num_key_value_heads=4, head_dim=64,
        num_experts=32, num_experts_per_tok=4, moe_intermediate_size=512,
        max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config).eval()


def floor(model: PreTrainedModel, batches: list[Tensor]) -> None:
    """(a): nothing but the forward and the backward to the input embeddings."""
    view = MoEModel(model)
    with frozen_parameters(model):
        for ids_NW in batches:
            embeddings = model.get_input_embeddings()(ids_NW).detach().requires_grad_()
            summed_loss_backward(view, view.hidden_states(inputs_embeds=embeddings), ids_NW)


def statistics_bytes(model: MoEModel) -> int:
    layers = [
        LayerStatistics.zeros(layer.num_experts, layer.width, torch.device("cpu")) for layer in model.layers
    ]
    return sum(getattr(layer, field.name).numel() * 8 for layer in layers for field in fields(layer))


def seconds(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument(
        "--skip-two-stage", action="store_true", help="only (a) and (b), which takes a fifth of the time"
    )
    arguments = parser.parse_args()
    model = build_model()
    generator = torch.Generator().manual_seed(0)
    batches = list(torch.randint(0, 8192, (arguments.sequences, 512), generator=generator).split(4))
    print(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f} million parameters,"
        f" {torch.get_num_threads()} threads"
    )

    view = MoEModel(model)
    procedures: dict[str, Callable[[], object]] = {
        "(a) floor": lambda: (model.set_experts_implementation("grouped_mm"), floor(model, batches)),
        "(b) heapr": lambda: collect(view, batches),
        "(c) two-stage": lambda: two_stage_scores(view, batches),
        "(d) published": lambda: two_stage_scores(view, batches, frozen=False),
    }
    if arguments.skip_two_stage:
        procedures = dict(list(procedures.items())[:2])
    times: dict[str, list[float]] = {name: [] for name in procedures}
    for repeat in range(arguments.repeats + 1):
        for name, procedure in procedures.items():
            elapsed = seconds(procedure)
            if repeat:  # the first round warms up
                times[name].append(elapsed)
    medians = {name: descriptive.median(values) for name, values in times.items()}
    for name, values in times.items():
        print(
            f"{name:14} median {medians[name]:7.2f} s   all: {' '.join(f'{value:.2f}' for value in values)}"
        )
    print(f"(b)/(a) = {medians['(b) heapr'] / medians['(a) floor']:.2f}")
    if arguments.skip_two_stage:
        return
    for name in ("(c) two-stage", "(d) published"):
        print(f"{name[:3]}/(b) = {medians[name] / medians['(b) heapr']:.2f}")
    ours = statistics_bytes(view)
    theirs = sum(layer.num_experts * layer.model_width**2 * 4 for layer in view.layers)
    print(f"statistics {ours / 2**20:.1f} MiB, matrices of (c) {theirs / 2**20:.0f} MiB: {ours / theirs:.2%}")
    expected = torch.cat([score_EF.flatten() for score_EF in two_stage_scores(view, batches).values()])
    scores = torch.cat(
        [score_EF.flatten() for score_EF in Heapr()(collect(view, batches), {}).layers.values()]
    )
    routed = expected > 0  # experts without tokens have another score by convention
    difference = (scores - expected)[routed].norm() / expected[routed].norm()
    print(f"scores of (b) and (c): norm of the difference / norm {difference:.1e}")


if __name__ == "__main__":
    main()
