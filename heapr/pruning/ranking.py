"""Masks and indices of the highest scores. Ties are broken by index.

Shape letters: E experts, F atomic experts of the widest expert, S any number of scores.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from heapr.pruning.budget import Budget


def only_existing(scores_EF: Tensor, width_E: Sequence[int]) -> Tensor:
    """Scores as float64, with -inf beyond each expert's width."""
    widest = scores_EF.shape[1]
    position_F = torch.arange(widest)
    width_E1 = torch.tensor(width_E).unsqueeze(1)
    is_beyond_EF = position_F >= width_E1
    return scores_EF.double().masked_fill(is_beyond_EF, -math.inf)


def protect(scores_EF: Tensor, index: int, budget: Budget) -> Tensor:
    """Set the scores of atomic experts that must stay to infinity.

    These are all atomic experts of a protected layer. In other layers, they are those of protected experts,
    and the best atomic expert (the first of equals) of each of the K best experts.
    """
    if index in budget.protected_layers:
        exists_EF = scores_EF > -math.inf
        return scores_EF.masked_fill(exists_EF, math.inf)
    protected_EF = scores_EF.clone()
    best_E = scores_EF.amax(dim=1)
    best_E[budget.protected_in(index)] = math.inf  # they are among the K anyway
    num_present = int((best_E > -math.inf).sum())
    num_protected = min(budget.experts_per_token, num_present)
    for expert in highest(best_E, num_protected):
        best = scores_EF[expert].argmax()
        protected_EF[expert, best] = math.inf
    for expert in budget.protected_in(index):
        exists_F = scores_EF[expert] > -math.inf
        protected_EF[expert, exists_F] = math.inf
    return protected_EF


def highest(score_E: Tensor, number: int) -> list[int]:
    """Indices of the `number` highest scores, highest first. Of equal scores the first are chosen."""
    order_E = torch.sort(score_E, descending=True, stable=True).indices
    highest_E = order_E[:number]
    indices: list[int] = highest_E.tolist()
    return indices


def lowest_first(scores: Tensor) -> Tensor:
    """Indices that sort the last dimension, lowest first. Equal scores keep their order."""
    return torch.sort(scores, stable=True).indices


def keep_highest(scores_S: Tensor, num_removed: int) -> Tensor:
    """Mask that drops the `num_removed` lowest scores. Of equal scores the first are dropped."""
    order_S = lowest_first(scores_S)
    removed_S = order_S[:num_removed]
    kept_S = torch.ones(len(scores_S), dtype=torch.bool)
    kept_S[removed_S] = False
    return kept_S


def keep_number_of_each(scores_EF: Tensor, number: int) -> Tensor:
    """Mask of the `number` best atomic experts of each expert, as below."""
    num_experts = len(scores_EF)
    width_E = torch.full((num_experts,), number)
    return keep_best_of_each(scores_EF, width_E)


def keep_best_of_each(scores_EF: Tensor, width_E: Tensor) -> Tensor:
    """Mask of the `width_E` best atomic experts of each expert. Of equal scores the last stay."""
    order_EF = lowest_first(scores_EF)
    widest = scores_EF.shape[1]
    num_removed_E1 = widest - width_E.unsqueeze(1)
    # In sorted order.
    place_F = torch.arange(widest)
    stays_EF = place_F >= num_removed_E1
    kept_EF = torch.zeros_like(stays_EF)
    return kept_EF.scatter(1, order_EF, stays_EF)
