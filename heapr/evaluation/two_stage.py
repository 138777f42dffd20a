"""The published two-stage calibration, as the measure of what the identity saves: (3) and (4) of
docs/method.md, literally.

In: a model and batches. Out: HEAPr's scores by decoder layer index. First stage: a forward and a backward
pass, a D x D matrix per expert. Second stage: another forward pass. Parameters are frozen as in the
calibration, so that the procedures differ in nothing else, unless their gradients are asked for, which the
published code computes too.
Shape letters: D model width, E experts, F atomic experts of an expert, S (token, expert) pairs sorted by
expert, n tokens of one expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor

from heapr.model.experts.dispatch import observe_experts
from heapr.model.experts.loop import split_by_expert
from heapr.model.moe import (
    MoELayer,
    MoEModel,
    frozen_parameters,
    gradient_from_embeddings,
    summed_loss_backward,
)
from heapr.types import ExpertWeights


class GradientMatrices:
    """First stage: sums of g g^T over the tokens of each expert, g = dloss/dE(x), float32 (E, D, D)."""

    def __init__(self, layer: MoELayer) -> None:
        device = layer.experts.down_proj.device
        self.sum_EDD = torch.zeros(layer.num_experts, layer.model_width, layer.model_width, device=device)
        self.count_E = torch.zeros(layer.num_experts, device=device)

    def __call__(self, h_SF: Tensor, router_weight_S: Tensor, output_SD: Tensor, offsets: Tensor) -> None:
        if output_SD.requires_grad:
            output_SD.register_hook(partial(self._add, offsets))

    def _add(self, offsets: Tensor, grad_SD: Tensor) -> None:
        self.count_E += offsets.diff().to(self.count_E.device)
        for sum_DD, g_nD in zip(self.sum_EDD, split_by_expert(grad_SD.float(), offsets), strict=True):
            sum_DD.addmm_(g_nD.T, g_nD)


class ActivationSquares:
    """Second stage: sums of h^2 over the tokens of each expert, float32 (E, F)."""

    def __init__(self, layer: MoELayer) -> None:
        self.sum_EF = torch.zeros(layer.num_experts, layer.width, device=layer.experts.down_proj.device)

    def __call__(self, h_SF: Tensor, router_weight_S: Tensor, output_SD: Tensor, offsets: Tensor) -> None:
        sums = [h_nF.float().square().sum(0) for h_nF in split_by_expert(h_SF, offsets)]
        self.sum_EF += torch.stack(sums)


def two_stage_scores(model: MoEModel, batches: Sequence[Tensor], *, frozen: bool = True) -> dict[int, Tensor]:
    """1/2 mean(h_k^2) w_k^T G w_k, float32 (E, F) by decoder layer index; 0 for experts without tokens.

    Args:
        model: dense or pruned.
        batches: int64 (N, W) token ids each.
        frozen: False computes the gradients of all parameters too, and drops them.
    """
    matrices = [GradientMatrices(layer) for layer in model.layers]
    squares = [ActivationSquares(layer) for layer in model.layers]
    experts = [layer.experts for layer in model.layers]
    with frozen_parameters(model.model) if frozen else nullcontext(), gradient_from_embeddings(model.model):
        with observe_experts(model.model, list(zip(experts, matrices, strict=True))):
            for ids_NW in batches:
                summed_loss_backward(model, model.hidden_states(input_ids=ids_NW), ids_NW)
                model.model.zero_grad()
        with torch.no_grad(), observe_experts(model.model, list(zip(experts, squares, strict=True))):
            for ids_NW in batches:
                model.hidden_states(input_ids=ids_NW)
    found = zip(model.layers, matrices, squares, strict=True)
    return {layer.index: _scores(layer.weights(), matrix, square) for layer, matrix, square in found}


@torch.no_grad()
def _scores(weights: ExpertWeights, matrices: GradientMatrices, squares: ActivationSquares) -> Tensor:
    count_E1 = matrices.count_E.clamp(min=1).unsqueeze(1)
    rows = []
    for down_DF, sum_DD in zip(weights.down_EDF, matrices.sum_EDD, strict=True):
        # (4), without the mean over tokens.
        rows.append((down_DF.float() * (sum_DD @ down_DF.float())).sum(0))
    return 0.5 * (squares.sum_EF / count_E1) * (torch.stack(rows) / count_E1)
