"""Criteria that need no data: `magnitude` and `random`, the controls.

In: weights (magnitude) or a seed (random). Out: scores without a unit.
"""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor

from heapr.score.criterion import Unit, WeightsOf
from heapr.types import Granularity, Scores, Statistics


class Magnitude:
    """Euclidean norm of an atomic expert's three weight slices taken together:

        s_k = sqrt(||w_gate,k||^2 + ||w_up,k||^2 + ||w_down,k||^2)

    with w_gate,k and w_up,k the rows k of W_gate and W_up and w_down,k column k of W_down. Experts without a
    gate have two slices.
    """

    unit = Unit.NONE
    granularity = Granularity.ATOMIC_EXPERT

    def __call__(self, statistics: Statistics, weights: WeightsOf) -> Scores:
        scores = {}
        for index in statistics.layers:
            layer = weights(index)
            norms = [] if layer.gate_EFD is None else [_norm(layer.gate_EFD, dim=2)]
            norms += [_norm(layer.up_EFD, dim=2), _norm(layer.down_EDF, dim=1)]
            norm_EF = torch.linalg.vector_norm(torch.stack(norms), dim=0)
            scores[index] = norm_EF.cpu()
        return Scores(layers=scores)


def _norm(weight: Tensor, dim: int) -> Tensor:
    """Euclidean norm of each slice along `dim`, float32 (E, F)."""
    norm_EF: Tensor = torch.linalg.vector_norm(weight, dim=dim, dtype=torch.float32)
    return norm_EF


class Random:
    """Uniform random numbers in [0, 1), drawn layer after layer: the control.

    Args:
        seed: the generator's seed, at least 0.
    """

    unit = Unit.NONE
    granularity = Granularity.ATOMIC_EXPERT

    def __init__(self, seed: Annotated[int, Ge(0)]) -> None:
        self.seed = seed

    def __call__(self, statistics: Statistics, weights: WeightsOf) -> Scores:
        generator = torch.Generator().manual_seed(self.seed)
        scores = {}
        for index, layer in statistics.layers.items():
            scores[index] = torch.rand(layer.shape, generator=generator)
        return Scores(layers=scores)
