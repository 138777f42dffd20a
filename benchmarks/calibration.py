"""Time and memory of calibration, in one run on one machine:

    (a) floor:     the bare model's forward and input-gradient backward, experts by transformers' grouped_mm
    (b) heapr:     the same with the statistics collected (heapr.calibration.collector)
    (c) two-stage: the published procedure, straightforwardly: gradients of all parameters and a D x D matrix per expert
                   from a first forward and backward, scores from a second forward

Run:  python benchmarks/calibration.py        (make bench; about 218 million parameters in float32, 4 GiB of memory)
Out:  medians, and the ratios (b)/(a) and (c)/(b). The three take turns, so that a noisy machine disturbs all alike.
"""

from __future__ import annotations

import argparse
import statistics as descriptive
import time
from collections.abc import Callable
from dataclasses import fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from heapr.calibration.collector import collect
from heapr.model.moe import MoEModel, frozen_parameters, summed_loss_backward
from heapr.score.gradient import Heapr
from heapr.types import LayerStatistics


def build_model() -> PreTrainedModel:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=8192, hidden_size=1024, num_hidden_layers=4, num_attention_heads=16, num_key_value_heads=4, head_dim=64,
        num_experts=32, num_experts_per_tok=4, moe_intermediate_size=512, max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config).eval()


def floor(model: PreTrainedModel, batches: list[Tensor]) -> None:
    """(a): nothing but the forward and the backward to the input embeddings."""
    view = MoEModel(model)
    with frozen_parameters(model):
        for ids_NW in batches:
            embeddings = model.get_input_embeddings()(ids_NW).detach().requires_grad_()
            summed_loss_backward(view, view.hidden_states(inputs_embeds=embeddings), ids_NW)


class TwoStage:
    """(c): (3) and (4) of docs/method.md as published; float32 D x D matrices, one per expert."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.experts = [module for module in model.modules() if hasattr(module, "gate_up_proj")]
        num_experts, model_width, _ = self.experts[0].down_proj.shape
        self.G = {layer: torch.zeros(num_experts, model_width, model_width) for layer in self.experts}
        self.count = {layer: torch.zeros(num_experts) for layer in self.experts}
        self.scores = {layer: torch.zeros(num_experts, layer.down_proj.shape[2]) for layer in self.experts}

    @property
    def matrix_bytes(self) -> int:
        return sum(matrix.numel() * matrix.element_size() for matrix in self.G.values())

    def run(self, batches: list[Tensor]) -> list[Tensor]:
        self._with(self._gradient_stage_forward)
        for ids_NW in batches:
            logits = self.model(input_ids=ids_NW, use_cache=False).logits[:, :-1]
            F.cross_entropy(logits.flatten(0, 1), ids_NW[:, 1:].flatten(), reduction="sum").backward()
            self.model.zero_grad()
        for layer, matrices in self.G.items():
            matrices.div_(self.count[layer].clamp(min=1)[:, None, None])
        self._with(self._score_stage_forward)
        with torch.no_grad():
            for ids_NW in batches:
                self.model(input_ids=ids_NW, use_cache=False)
        return [self.scores[layer] / self.count[layer].clamp(min=1)[:, None] for layer in self.experts]

    def _with(self, forward: Callable[..., Tensor]) -> None:
        ALL_EXPERTS_FUNCTIONS.register("two_stage", forward)
        self.model.set_experts_implementation("two_stage")

    def _gradient_stage_forward(self, layer: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        def visit(expert: int, h: Tensor, output: Tensor) -> None:
            def add(g: Tensor) -> None:
                self.G[layer][expert].addmm_(g.T, g)

            output.register_hook(add)
            self.count[layer][expert] += len(h)

        return _expert_loop(layer, hidden, index, weights, visit=visit)

    def _score_stage_forward(self, layer: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        def visit(expert: int, h: Tensor, output: Tensor) -> None:
            down = layer.down_proj[expert]
            quadratic = (down * (self.G[layer][expert] @ down)).sum(0)  # w_k^T G w_k
            self.scores[layer][expert] += 0.5 * h.square().sum(0) * quadratic

        return _expert_loop(layer, hidden, index, weights, visit=visit)


def _expert_loop(
    layer: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor, *, visit: Callable[[int, Tensor, Tensor], None]
) -> Tensor:
    """The experts' forward as in transformers' eager implementation."""
    total = torch.zeros_like(hidden)
    for expert in range(layer.num_experts):
        token, position = torch.where(index == expert)
        if len(token):
            gate, up = F.linear(hidden[token], layer.gate_up_proj[expert]).chunk(2, dim=-1)
            h = layer.act_fn(gate) * up
            output = F.linear(h, layer.down_proj[expert])
            visit(expert, h, output)
            total = total.index_add(0, token, output * weights[token, position, None])
    return total


def statistics_bytes(model: MoEModel) -> int:
    layers = [LayerStatistics.zeros(layer.num_experts, layer.width, torch.device("cpu")) for layer in model.layers]
    return sum(getattr(layer, field.name).numel() * 8 for layer in layers for field in fields(layer))


def seconds(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--skip-two-stage", action="store_true", help="only (a) and (b), which takes a fifth of the time")
    arguments = parser.parse_args()
    model = build_model()
    generator = torch.Generator().manual_seed(0)
    batches = list(torch.randint(0, 8192, (arguments.sequences, 512), generator=generator).split(4))
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f} million parameters, {torch.get_num_threads()} threads")

    two_stage = TwoStage(model)
    procedures = {
        "(a) floor": lambda: (model.set_experts_implementation("grouped_mm"), floor(model, batches)),
        "(b) heapr": lambda: (model.set_experts_implementation("grouped_mm"), collect(MoEModel(model), batches)),
        "(c) two-stage": lambda: TwoStage(model).run(batches),
    }
    if arguments.skip_two_stage:
        del procedures["(c) two-stage"]
    times: dict[str, list[float]] = {name: [] for name in procedures}
    for repeat in range(arguments.repeats + 1):
        for name, procedure in procedures.items():
            elapsed = seconds(procedure)
            if repeat:  # the first round warms up
                times[name].append(elapsed)
    medians = {name: descriptive.median(values) for name, values in times.items()}
    for name, values in times.items():
        print(f"{name:14} median {medians[name]:7.2f} s   all: {' '.join(f'{value:.2f}' for value in values)}")
    a, b, *c = medians.values()
    print(f"(b)/(a) = {b / a:.2f}")
    if not c:
        return
    print(f"(c)/(b) = {c[0] / b:.2f}")
    ours, theirs = statistics_bytes(MoEModel(model)), two_stage.matrix_bytes
    print(f"statistics {ours / 2**20:.1f} MiB, matrices of (c) {theirs / 2**20:.0f} MiB: {ours / theirs:.2%}")
    expected = torch.cat([score.flatten() for score in two_stage.run(batches)])
    model.set_experts_implementation("grouped_mm")
    scores = torch.cat([score.flatten() for score in Heapr()(collect(MoEModel(model), batches), {}).layers.values()])
    print(f"scores of (b) and (c): largest relative difference {((scores - expected).abs() / expected).max():.1e}")


if __name__ == "__main__":
    main()
