"""Criteria from activations and W_down, without gradients: `activation` and `camera`.

In: statistics and W_down. Out: scores without a unit. Symbols: h the activation of an atomic expert, p the
router weight, w_k column k of W_down. Equation numbers are those of docs/method.md.
"""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Ge, Le
from torch import Tensor

from heapr.score.criterion import Unit, WeightsOf, mean_over_routed, unrouted_last
from heapr.types import ExpertWeights, Granularity, Scores, Statistics


class Activation:
    """Mean square of an atomic expert's contribution to its expert's output:

        s_k = mean(h_k^2) ||w_k||^2                                                          (11)

    The mean is over the tokens routed to the expert. This is Wanda's score of a single weight,
    |W_ik| ||h_k||, squared, summed over column k and divided by the number of tokens (Sun et al., "A Simple
    and Effective Pruning Approach for Large Language Models", arXiv 2306.11695). Experts without tokens score
    -1.
    """

    unit = Unit.NONE
    granularity = Granularity.ATOMIC_EXPERT

    def __call__(self, statistics: Statistics, weights: WeightsOf) -> Scores:
        scores = {}
        for index, layer in statistics.layers.items():
            h_sq_EF = mean_over_routed(layer.h_sq_sum_EF, layer.count_E)
            score_EF = h_sq_EF * _down_norm_sq(weights(index))  # (11)
            scores[index] = unrouted_last(score_EF, layer)
        return Scores(layers=scores)


class Camera:
    """CAMERA-P's energy of an atomic expert, a weighted mean of its sum and its maximum over tokens:

        s_k = [(1 - a) sum (p h_k)^2 + a max (p h_k)^2] ||w_k||^2                            (12)

    with a the weight of the maximum; sum and maximum are over the tokens routed to the expert. Xu et al.,
    "CAMERA: Multi-Matrix Joint Compression for MoE Models via Micro-Expert Redundancy Analysis" (arXiv
    2508.02322, AAAI 2026), where atomic experts are called micro-experts. To rank inside each layer as the
    paper does, use pruning=layer. The paper also ranks shared experts, and measures each layer with earlier
    ones already pruned; this class does neither. Experts without tokens score -1.

    Args:
        alpha: a, in [0, 1].
    """

    unit = Unit.NONE
    granularity = Granularity.ATOMIC_EXPERT

    def __init__(self, alpha: Annotated[float, Ge(0), Le(1)]) -> None:
        self.alpha = alpha

    def __call__(self, statistics: Statistics, weights: WeightsOf) -> Scores:
        scores = {}
        for index, layer in statistics.layers.items():
            energy_EF = (1 - self.alpha) * layer.ph_sq_sum_EF + self.alpha * layer.ph_abs_max_EF.square()
            score_EF = energy_EF * _down_norm_sq(weights(index))  # (12)
            scores[index] = unrouted_last(score_EF, layer)
        return Scores(layers=scores)


def _down_norm_sq(weights: ExpertWeights) -> Tensor:
    """||w_k||^2, float64 (E, F)."""
    norm_EF: Tensor = torch.linalg.vector_norm(weights.down_EDF, dim=1, dtype=torch.float32)
    return norm_EF.cpu().double().square()
