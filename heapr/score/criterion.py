"""What a criterion is: statistics and weights in, one score per atomic expert out; high scores are important.

Shape letters: D model width, E experts, F atomic experts of an expert. Symbols: h the activation of an atomic
expert, g = dloss/dh with loss the sum over N predicted tokens, n the number of tokens routed to the expert.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Protocol

import torch
from torch import Tensor

from heapr.types import ExpertWeights, Granularity, LayerStatistics, Scores, Statistics

WeightsOf = Callable[[int], ExpertWeights]  # by decoder layer index
UNROUTED_SCORE = -1.0  # below all scores of experts that got tokens (docs/method.md)


class Unit(Enum):
    """What a criterion's scores predict about the removal of one atomic expert."""

    NATS = "increase of the mean loss, in nats per predicted token"
    NATS_PER_ROUTED_TOKEN = "increase of the summed loss, in nats per token routed to the expert"
    NONE = "none: only the order means something"


class Criterion(Protocol):
    """A pure function of statistics and weights.

    With the granularity of whole experts, all atomic experts of an expert get the same score.
    """

    unit: Unit
    granularity: Granularity  # what is removed as one piece

    def __call__(self, statistics: Statistics, weights: WeightsOf) -> Scores:
        """Scores of all layers in the statistics."""
        ...


def mean_over_routed(sum_EF: Tensor, count_E: Tensor) -> Tensor:
    """Mean over the tokens routed to each expert; 0 for experts without tokens."""
    return sum_EF / count_E.clamp(min=1).unsqueeze(1)


def unrouted_last(scores_EF: Tensor, layer: LayerStatistics) -> Tensor:
    """Scores in float32, with experts that got no calibration token ranked below all others."""
    unrouted_E1 = (layer.count_E == 0).unsqueeze(1)
    return torch.where(unrouted_E1, UNROUTED_SCORE, scores_EF).float()


def predicted_increase(scores: Scores, unit: Unit, statistics: Statistics) -> dict[int, Tensor] | None:
    """The increase of the mean loss, in nats per token, that scores predict for removing each atomic expert.

    The mean is over the calibration tokens. A score s_k per routed token predicts

        n/N s_k

    with n the number of tokens routed to the expert and N the number of predicted tokens; for `heapr` this is
    (7) of docs/method.md. The prediction for experts without tokens is 0.

    Returns:
        float64 (E, F) by decoder layer index; None if the scores have no unit.
    """
    if unit is Unit.NONE:
        return None
    predicted = {}
    for index, scores_EF in scores.layers.items():
        count_E1 = statistics.layers[index].count_E.unsqueeze(1)
        factor_E1 = torch.ones_like(count_E1)
        if unit is Unit.NATS_PER_ROUTED_TOKEN:
            factor_E1 = count_E1 / statistics.num_predicted_tokens
        predicted[index] = torch.where(count_E1 == 0, 0.0, scores_EF.double() * factor_E1)
    return predicted
