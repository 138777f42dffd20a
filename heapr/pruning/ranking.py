"""Which of some scores rank highest, as masks and indices. Ties are broken by index.

Shape letters: E experts, F atomic experts of the widest expert, S any number of scores.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from heapr.pruning.budget import Budget


def only_existing(scores_EF: Tensor, width_E: Sequence[int]) -> Tensor:
    """float64 scores, -inf beyond an expert's width."""
    beyond_EF = torch.arange(scores_EF.shape[1]) >= torch.tensor(width_E).unsqueeze(1)
    return scores_EF.double().masked_fill(beyond_EF, -math.inf)


def protect(scores_EF: Tensor, index: int, budget: Budget) -> Tensor:
    """Scores of a layer, raised to infinity where atomic experts must stay.

    These are all of a protected layer, else the best one (the first of equals) of each of the K best experts.
    """
    if index in budget.protected_layers:
        return scores_EF.masked_fill(scores_EF > -math.inf, math.inf)
    protected_EF = scores_EF.clone()
    best_E = scores_EF.amax(dim=1)
    num_present = int((best_E > -math.inf).sum())
    for expert in highest(best_E, min(budget.experts_per_token, num_present)):
        protected_EF[expert, scores_EF[expert].argmax()] = math.inf
    return protected_EF


def highest(score_E: Tensor, number: int) -> list[int]:
    """Indices of the highest scores; of equal ones the first."""
    order_E = torch.sort(score_E, descending=True, stable=True).indices
    indices: list[int] = order_E[:number].tolist()
    return indices


def keep_highest(scores_S: Tensor, num_removed: int) -> Tensor:
    """Mask without the lowest scores; of equal ones the first go."""
    order_S = torch.sort(scores_S, stable=True).indices
    kept_S = torch.ones(len(scores_S), dtype=torch.bool)
    kept_S[order_S[:num_removed]] = False
    return kept_S


def keep_best_of_each(scores_EF: Tensor, width_E: Tensor) -> Tensor:
    """Mask of every expert's best atomic experts, `width_E` of each; of equal ones the last stay."""
    order_EF = torch.sort(scores_EF, dim=1, stable=True).indices
    widest = scores_EF.shape[1]
    stays_EF = torch.arange(widest) >= widest - width_E.unsqueeze(1)  # in that order
    return torch.zeros_like(stays_EF).scatter(1, order_EF, stays_EF)
