"""What a criterion is: statistics and weights in, one importance per atomic expert out. Bigger is more important.

Shape letters: D model width, E experts, F atomic experts of an expert. Symbols: h the activation of an atomic expert,
g = dloss/dh with loss the sum over N predicted tokens, n the number of tokens routed to the expert.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from heapr.types import ExpertWeights, LayerStatistics, Scores, Statistics

WeightsOf = Callable[[int], ExpertWeights]  # by decoder layer index
UNROUTED_SCORE = -1.0  # below every score of an expert that was reached (docs/method.md)


class Criterion(Protocol):
    """A pure function of statistics and weights."""

    def __call__(self, statistics: Statistics, weights: WeightsOf) -> Scores:
        """Scores of all layers of the statistics."""
        ...


def mean_over_routed(sum_EF: Tensor, count_E: Tensor) -> Tensor:
    """Mean over the tokens routed to each expert; 0 where there is none."""
    return sum_EF / count_E.clamp(min=1).unsqueeze(1)


def unrouted_last(scores_EF: Tensor, layer: LayerStatistics) -> Tensor:
    """float32 scores, experts that no calibration token reached set below every other."""
    unrouted_E1 = (layer.count_E == 0).unsqueeze(1)
    return torch.where(unrouted_E1, UNROUTED_SCORE, scores_EF).float()
