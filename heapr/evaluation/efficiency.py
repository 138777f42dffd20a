"""Size and compute of a model: parameters, atomic experts, bytes, FLOPs per token.

In: a dense or pruned model, and the dense model's routing frequencies. Out: counts. `size_change` compares
two models.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from annotated_types import Ge
from torch.utils.flop_counter import FlopCounterMode

from heapr.evaluation.measurement import Material, Need, weight_bytes
from heapr.model.costs import eager_attention
from heapr.model.experts.dispatch import skip_experts
from heapr.model.experts.layout import layout_of, matrices_of
from heapr.model.load import ModelSource
from heapr.model.moe import MoELayer, MoEModel
from heapr.types import Evaluation, Metrics, Statistics

FLOPS_PER_MULTIPLY_ADD = 2
# Metric of the share removed, and the count that it refers to.
REMOVED_RATIOS = {
    "parameters_removed_ratio": "parameters",
    "parameters_routed_removed_ratio": "parameters_routed",
    "parameters_active_removed_ratio": "parameters_active_per_token",
    "atomic_experts_removed_ratio": "atomic_experts",
    "bytes_removed_ratio": "bytes",
    "flops_removed_ratio": "flops_per_token",
    "flops_routed_removed_ratio": "flops_per_token_routed",
}


class Efficiency:
    """Counts parameters, bytes and FLOPs. Nothing is timed.

    Expert e of width F_e has P_e = 3 D F_e weights, or 2 D F_e without a gate (docs/method.md, 1). With f_e
    the share of the calibration tokens that the dense model routes to expert e, and sums over all routed
    experts of all MoE layers:

        parameters_active_per_token = parameters_other + sum of f_e P_e
        flops_per_token_routed      = 2 * sum of f_e P_e
        flops_per_token             = flops_other / window + flops_per_token_routed

    where parameters_other are the parameters outside the routed experts, and flops_other the FLOPs outside
    the routed experts for one window, counted by torch. Biases do not count in P_e.

    Zeros are counted like other weights, so a masked model saves neither parameters nor FLOPs.
    `parameters_zero` are the weights of atomic experts that are entirely zero; `atomic_experts` counts the
    other atomic experts.

    The share of FLOPs removed differs from the share of atomic experts removed, because experts that many
    tokens visit may keep more than others.

    Args:
        window: tokens in the window for which FLOPs are counted, at least 2.
    """

    name = "efficiency"
    needs = frozenset({Need.MODEL, Need.STATISTICS})
    objectives = (*REMOVED_RATIOS, *REMOVED_RATIOS.values())

    def __init__(self, window: Annotated[int, Ge(2)]) -> None:
        self.window = window

    def identity(self) -> dict[str, Any]:
        return {"evaluator": self.name, "window": self.window}

    def prepare(self, source: ModelSource) -> None:
        """Nothing to prepare."""

    def __call__(self, material: Material) -> Evaluation:
        return Evaluation(count(material.model(), material.statistics(), self.window))


def count(model: MoEModel, statistics: Statistics, window: int) -> Metrics:
    """The counts of `Efficiency`, by name.

    Args:
        model: dense or pruned.
        statistics: of the dense model.
        window: tokens in the window for which FLOPs are counted.
    """
    num_parameters = sum(parameter.numel() for parameter in model.model.parameters())
    num_routed = num_zero = num_atomic_experts = 0
    for layer in model.layers:
        with model.hold([layer.index]):
            zeros = zero_atomic_experts(layer)
        num_routed += sum(parameter.numel() for parameter in layer.experts.parameters())
        num_zero += zeros * layer.atomic_expert_parameters
        num_atomic_experts += sum(layer.widths) - zeros
    visited = visited_parameters_per_token(model, statistics)
    flops_routed = FLOPS_PER_MULTIPLY_ADD * visited
    metrics: Metrics = {
        "parameters": num_parameters,
        "parameters_routed": num_routed,
        "parameters_active_per_token": num_parameters - num_routed + visited,
        "parameters_zero": num_zero,
        "atomic_experts": num_atomic_experts,
        "bytes": weight_bytes(model),
        "flops_per_token": other_flops(model, window) / window + flops_routed,
        "flops_per_token_routed": flops_routed,
    }
    return metrics


def visited_parameters_per_token(model: MoEModel, statistics: Statistics) -> float:
    """Mean number of routed experts' weights that a token visits, sum of f_e P_e.

    Each visited weight is one multiplication and one addition.
    """
    total = 0.0
    for layer in model.layers:
        experts = matrices_of(layer.experts)
        weights = [each.inputs_GD.numel() + each.down_DF.numel() for each in experts]
        visits_E = statistics.layers[layer.index].count_E.cpu()
        if len(weights) < len(visits_E):
            # Experts are gone from the router too: their visits go to the others, all of one width.
            visits_E = visits_E.sum().expand(len(weights)) / len(weights)
        visited_E = visits_E * torch.tensor(weights)
        total += float(visited_E.sum()) / statistics.num_tokens
    return total


@torch.no_grad()
def zero_atomic_experts(layer: MoELayer) -> int:
    """Number of atomic experts whose rows of W_gate and W_up and column of W_down are all zeros.

    Masking leaves such atomic experts.
    """
    layout = layout_of(layer.experts)
    number = 0
    for matrices in matrices_of(layer.experts):
        has_column_F = matrices.down_DF.any(dim=0)
        has_row_G = matrices.inputs_GD.any(dim=1)
        has_row_F = has_row_G
        if layout.has_gate and layout.is_concatenated:
            has_gate_F, has_up_F = has_row_G.chunk(2)
            has_row_F = has_gate_F | has_up_F
        elif layout.has_gate:
            has_row_F = has_row_G[::2] | has_row_G[1::2]
        is_zero_F = ~(has_column_F | has_row_F)
        number += int(is_zero_F.sum())
    return number


@torch.no_grad()
def other_flops(model: MoEModel, window: int) -> float:
    """FLOPs outside the routed experts for one window, counted by torch."""
    ids_NW = torch.zeros((1, window), dtype=torch.int64, device=model.device)
    with skip_experts(model.model), eager_attention(model), FlopCounterMode(display=False) as counter:
        model.model(input_ids=ids_NW, use_cache=False)
    return float(counter.get_total_flops())


def size_change(dense: Metrics, pruned: Metrics) -> Metrics:
    """The pruned model's counts and the share of each that was removed, for all counts of both models."""
    counts: Metrics = {}
    ratios: Metrics = {}
    for ratio, name in REMOVED_RATIOS.items():
        if name in dense and name in pruned:
            counts[name] = pruned[name]
            ratios[ratio] = 1 - pruned[name] / dense[name]
    return counts | ratios
