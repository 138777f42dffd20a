"""Size and arithmetic of a model: parameters, atomic experts, bytes, FLOPs per token.

In: a dense or pruned model, and the dense model's routing frequencies. Out: counts; `size_change` compares
two models.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from annotated_types import Ge
from torch.utils.flop_counter import FlopCounterMode

from heapr.evaluation.measurement import Material, Need
from heapr.model.costs import eager_attention
from heapr.model.experts.dispatch import skip_experts
from heapr.model.experts.layout import layout_of, matrices_of
from heapr.model.load import ModelSource
from heapr.model.moe import MoELayer, MoEModel
from heapr.types import Evaluation, Metrics, Statistics

FLOPS_PER_MULTIPLY_ADD = 2
REMOVED_RATIOS = {  # share removed, and of what
    "parameters_removed_ratio": "parameters",
    "parameters_routed_removed_ratio": "parameters_routed",
    "parameters_active_removed_ratio": "parameters_active_per_token",
    "atomic_experts_removed_ratio": "atomic_experts",
    "bytes_removed_ratio": "bytes",
    "flops_removed_ratio": "flops_per_token",
    "flops_routed_removed_ratio": "flops_per_token_routed",
}


class Efficiency:
    """Counts, not timings.

    Expert e of width F_e has P_e = 3 D F_e weights (docs/method.md, 1: rows of W_gate and W_up, columns of
    W_down; 2 D F_e without a gate). With f_e the share of the calibration tokens that the dense model routes
    to it, and sums over MoE layers and experts:

        parameters_active_per_token = those of everything but the routed experts + sum of f_e P_e (biases not
        counted) flops_per_token_routed      = 2 * sum of f_e P_e
        flops_per_token             = those of everything but the routed experts, counted by torch on one
        window and divided
                                      by its length, + flops_per_token_routed

    Counted is what the model holds and computes with, zeros too: a masked model saves neither parameters nor
    FLOPs. `parameters_zero` are those of atomic experts whose weights are all zeros; `atomic_experts` counts
    the others.

    Removing a share of the atomic experts is therefore not removing that share of the FLOPs: experts that
    many tokens visit may keep more than others.

    Args:
        window: tokens of the window on which attention is counted, at least 2.
    """

    name = "efficiency"
    needs = frozenset({Need.MODEL, Need.STATISTICS})

    def __init__(self, window: Annotated[int, Ge(2)]) -> None:
        self.window = window

    def identity(self) -> dict[str, Any]:
        return {"evaluator": self.name, "window": self.window}

    def prepare(self, source: ModelSource) -> None:
        """Nothing can go wrong."""

    def __call__(self, material: Material) -> Evaluation:
        model = material.model()
        parameters = list(model.model.parameters())
        num_parameters = sum(parameter.numel() for parameter in parameters)
        num_bytes = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
        num_routed = num_zero = num_atomic_experts = 0
        for layer in model.layers:
            with model.hold([layer.index]):
                zeros = zero_atomic_experts(layer)
            num_routed += sum(parameter.numel() for parameter in layer.experts.parameters())
            num_zero += zeros * layer.atomic_expert_parameters
            num_atomic_experts += sum(layer.widths) - zeros
        visited = visited_parameters_per_token(model, material.statistics())
        flops_routed = FLOPS_PER_MULTIPLY_ADD * visited
        metrics: Metrics = {
            "parameters": num_parameters,
            "parameters_routed": num_routed,
            "parameters_active_per_token": num_parameters - num_routed + visited,
            "parameters_zero": num_zero,
            "atomic_experts": num_atomic_experts,
            "bytes": num_bytes,
            "flops_per_token": other_flops(model, self.window) / self.window + flops_routed,
            "flops_per_token_routed": flops_routed,
        }
        return Evaluation(metrics)


def visited_parameters_per_token(model: MoEModel, statistics: Statistics) -> float:
    """Weights of the routed experts that a token visits, by routing frequency: each is one multiplication and
    addition."""
    total = 0.0
    for layer in model.layers:
        weights_E = [
            matrices.inputs_GD.numel() + matrices.down_DF.numel() for matrices in matrices_of(layer.experts)
        ]
        visits_E = statistics.layers[layer.index].count_E.cpu()
        total += float((visits_E * torch.tensor(weights_E)).sum()) / statistics.num_tokens
    return total


@torch.no_grad()
def zero_atomic_experts(layer: MoELayer) -> int:
    """Atomic experts whose rows of W_gate and W_up and whose column w_k are all zeros, as masking leaves
    them."""
    layout, number = layout_of(layer.experts), 0
    for matrices in matrices_of(layer.experts):
        has_column_F, has_row_G = matrices.down_DF.any(dim=0), matrices.inputs_GD.any(dim=1)
        if layout.has_gate:
            gate_F, up_F = has_row_G.chunk(2) if layout.is_concatenated else (has_row_G[::2], has_row_G[1::2])
            has_row_G = gate_F | up_F
        number += int((~(has_column_F | has_row_G)).sum())
    return number


@torch.no_grad()
def other_flops(model: MoEModel, window: int) -> float:
    """FLOPs of one window for everything but the routed experts, counted by torch."""
    ids_NW = torch.zeros((1, window), dtype=torch.int64, device=model.device)
    with skip_experts(model.model), eager_attention(model), FlopCounterMode(display=False) as counter:
        model.model(input_ids=ids_NW, use_cache=False)
    return float(counter.get_total_flops())


def size_change(dense: Metrics, pruned: Metrics) -> Metrics:
    """The pruned model's counts, and the share of each that was removed; of those that were measured."""
    measured = {ratio: name for ratio, name in REMOVED_RATIOS.items() if name in dense and name in pruned}
    counts = {name: pruned[name] for name in measured.values()}
    return counts | {ratio: 1 - pruned[name] / dense[name] for ratio, name in measured.items()}
