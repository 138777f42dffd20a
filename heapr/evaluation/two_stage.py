"""The published two-stage calibration, a literal form of (3) and (4) of docs/method.md, for comparison.

In: a model and batches. Out: HEAPr's scores by decoder layer index. The first stage is a forward and a
backward pass with a D x D matrix per expert. The second stage is another forward pass. By default, parameters
are frozen as in the calibration, so that nothing else differs. The published code does not freeze them.
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
from heapr.model.loss import frozen_parameters, gradient_from_embeddings, summed_loss_backward
from heapr.model.moe import MoELayer, MoEModel
from heapr.types import ExpertWeights


class GradientMatrices:
    """First stage: sums of g g^T over the tokens of each expert, float32 (E, D, D), with g = dloss/dE(x)."""

    def __init__(self, layer: MoELayer, *, on_host: bool = False) -> None:
        device = torch.device("cpu") if on_host else layer.experts.down_proj.device
        width = layer.model_width
        self.sum_EDD = torch.zeros(layer.num_experts, width, width, device=device)
        self.count_E = torch.zeros(layer.num_experts, device=device)

    def __call__(self, h_SF: Tensor, router_weight_S: Tensor, output_SD: Tensor, offsets: Tensor) -> None:
        if output_SD.requires_grad:
            output_SD.register_hook(partial(self._add, offsets))

    def _add(self, offsets: Tensor, grad_SD: Tensor) -> None:
        self.count_E += offsets.diff().to(self.count_E.device)
        of_experts = split_by_expert(grad_SD.float(), offsets)
        for sum_DD, g_nD in zip(self.sum_EDD, of_experts, strict=True):
            if sum_DD.device == g_nD.device:
                sum_DD.addmm_(g_nD.T, g_nD)
            else:
                sum_DD.add_((g_nD.T @ g_nD).to(sum_DD.device))


class ActivationSquares:
    """Second stage: sums of h^2 over the tokens of each expert, float32 (E, F)."""

    def __init__(self, layer: MoELayer) -> None:
        device = layer.experts.down_proj.device
        self.sum_EF = torch.zeros(layer.num_experts, layer.width, device=device)

    def __call__(self, h_SF: Tensor, router_weight_S: Tensor, output_SD: Tensor, offsets: Tensor) -> None:
        sums = [h_nF.float().square().sum(0) for h_nF in split_by_expert(h_SF, offsets)]
        self.sum_EF += torch.stack(sums)


def two_stage_scores(
    model: MoEModel, batches: Sequence[Tensor], *, frozen: bool = True, on_host: bool = False
) -> dict[int, Tensor]:
    """Scores 1/2 mean(h_k^2) w_k^T G w_k, float32 (E, F) by decoder layer index.

    Experts that no token reached score 0.

    Args:
        model: dense or pruned.
        batches: token ids, int64 (N, W) each.
        frozen: with False, the gradients of all parameters are also computed, and dropped.
        on_host: whether the matrices are kept in the host's memory, where those of a whole model have to be.
    """
    matrices = [GradientMatrices(layer, on_host=on_host) for layer in model.layers]
    squares = [ActivationSquares(layer) for layer in model.layers]
    experts = [layer.experts for layer in model.layers]
    first_stage = list(zip(experts, matrices, strict=True))
    second_stage = list(zip(experts, squares, strict=True))
    freezing = frozen_parameters(model.model) if frozen else nullcontext()
    with freezing, gradient_from_embeddings(model.model):
        with observe_experts(model.model, first_stage):
            for ids_NW in batches:
                summed_loss_backward(model, model.hidden_states(input_ids=ids_NW), ids_NW)
                model.model.zero_grad()
        with torch.no_grad(), observe_experts(model.model, second_stage):
            for ids_NW in batches:
                model.hidden_states(input_ids=ids_NW)
    scores = {}
    for layer, of_gradient, of_activation in zip(model.layers, matrices, squares, strict=True):
        scores[layer.index] = _scores(layer.weights(), of_gradient, of_activation)
    return scores


@torch.no_grad()
def _scores(weights: ExpertWeights, matrices: GradientMatrices, squares: ActivationSquares) -> Tensor:
    """(4) of docs/method.md, for one layer."""
    curvatures = []
    for down_DF, sum_DD in zip(weights.down_EDF, matrices.sum_EDD, strict=True):
        w_DF = down_DF.to(sum_DD.device, torch.float32)
        curvature_F = (w_DF * (sum_DD @ w_DF)).sum(0)
        curvatures.append(curvature_F)
    count_E1 = matrices.count_E.clamp(min=1).unsqueeze(1)
    mean_square_EF = squares.sum_EF.to(count_E1.device) / count_E1
    mean_curvature_EF = torch.stack(curvatures) / count_E1
    return 0.5 * mean_square_EF * mean_curvature_EF  # (4)
