"""Allocation: from scores to a plan. How many atomic or whole experts go, and where; nothing about models.

In: scores, the widths of the experts they belong to, a budget, and costs where it is not counted in atomic
experts. Out: a `Plan`. Shape letters: E experts, F atomic experts of the widest expert, K experts per token,
S scores of several experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from heapr.pruning.allocation_by_cost import allocate_by_cost
from heapr.pruning.allocation_of_whole_experts import allocate_whole_experts
from heapr.pruning.budget import Budget, Costs, Widths, round_half_up
from heapr.pruning.ranking import highest, keep_best_of_each, keep_highest, only_existing, protect
from heapr.types import Granularity, Plan, Scores


def allocate(scores: Scores, widths: Widths, budget: Budget, costs: Costs | None = None) -> Plan:
    """Remove the atomic experts with the lowest scores, with the lowest scores for what they cost, or the
    whole experts with the lowest scores.

    Equal scores are removed in order of layer, expert and atomic expert. The best atomic expert of each
    layer's K best experts always stays, as do each layer's K best whole experts, and everything in protected
    layers.

    What a ratio removes, every higher one removes too: there is one order in which things go, and a ratio
    says how far. The exception is widths rounded to multiples, unless there are costs: an expert is rounded
    up when it wins the multiple that its layer has left over, and when more is removed elsewhere it may win
    it.

    Args:
        scores: bigger is more important. What lies beyond an expert's width is ignored.
        widths: of the scored experts.
        budget: how much.
        costs: `costs_of` the budget's unit.

    Raises:
        ConfigError: see `Budget.check`; or costs are such that the ratio cannot be reached.
    """
    assert (costs is None) == (budget.unit == "atomic_experts"), budget.unit
    layers = {index: only_existing(scores_EF, widths[index]) for index, scores_EF in scores.layers.items()}
    if costs is not None:
        return allocate_by_cost(layers, widths, budget, costs)
    if budget.granularity is Granularity.EXPERT:
        return allocate_whole_experts(layers, widths, budget)
    if budget.uniform_width is not None:
        return _uniform(layers, budget.uniform_width)
    exact = _exact(layers, widths, budget)
    return exact if budget.width_multiple == 1 else _round_widths(exact, layers, budget)


def _uniform(layers: Mapping[int, Tensor], width: int) -> Plan:
    """A plan that keeps the best atomic experts of every expert, `width` of each."""
    kept = {}
    for index, scores_EF in layers.items():
        width_E = torch.full((len(scores_EF),), width)
        kept[index] = keep_best_of_each(scores_EF, width_E)
    return Plan(layers=kept)


def _exact(layers: Mapping[int, Tensor], widths: Widths, budget: Budget) -> Plan:
    """A plan that removes exactly round(ratio * number of atomic experts), whatever the scope."""
    protected = {index: protect(scores_EF, index, budget) for index, scores_EF in layers.items()}
    numbers = budget.numbers_removed({index: widths[index] for index in layers})
    if budget.scope == "global":
        return Plan(layers=_remove_lowest(protected, numbers[0]))
    kept: dict[int, Tensor] = {}
    for (index, scores_EF), number in zip(protected.items(), numbers, strict=True):
        if budget.scope == "layer":
            kept |= _remove_lowest({index: scores_EF}, number)
        else:
            kept[index] = _remove_same_share(scores_EF, torch.tensor(widths[index]), number)
    return Plan(layers=kept)


def _remove_lowest(layers: Mapping[int, Tensor], number: int) -> dict[int, Tensor]:
    """Masks of some layers without the lowest `number` of their atomic experts, all ranked together."""
    scores_S = torch.cat([scores_EF.flatten() for scores_EF in layers.values()])
    num_absent = int((scores_S == -math.inf).sum())  # beyond their expert's width: these sort first
    kept_S = keep_highest(scores_S, num_absent + number)
    parts = kept_S.split([scores_EF.numel() for scores_EF in layers.values()])
    return {index: part_S.view_as(layers[index]) for index, part_S in zip(layers, parts, strict=True)}


def _remove_same_share(scores_EF: Tensor, width_E: Tensor, number: int) -> Tensor:
    """Mask of a layer without the first `number` of its atomic experts, if the j-th lowest of an expert of
    width w comes at the share (j - 1/2) / w; of equal shares the lowest score first, and what must stay
    last."""
    num_experts, widest = scores_EF.shape
    width_E1 = width_E.unsqueeze(1)
    sorted_EF = torch.sort(scores_EF, dim=1, stable=True).values
    rank_EF = torch.arange(widest) - (widest - width_E1)  # j - 1; absent ones, -inf, come first
    share_EF = (rank_EF.double() + 0.5) / width_E1.clamp(min=1)
    share_EF = share_EF.masked_fill(sorted_EF == math.inf, math.inf)

    by_score_S = torch.sort(sorted_EF.flatten(), stable=True).indices
    share_S = share_EF.flatten()[by_score_S]
    by_share_S = by_score_S[torch.sort(share_S, stable=True).indices]
    num_absent = int((rank_EF < 0).sum())
    expert_S = by_share_S[: num_absent + number] // widest
    num_removed_E = torch.bincount(expert_S, minlength=num_experts)
    return keep_best_of_each(scores_EF, widest - num_removed_E)


def _round_widths(plan: Plan, layers: Mapping[int, Tensor], budget: Budget) -> Plan:
    """Round every expert's width down or up to a multiple, and keep its best."""
    kept = {}
    for index, kept_EF in plan.layers.items():
        width_E = _rounded_widths(layers[index], kept_EF.sum(dim=1), budget)
        kept[index] = keep_best_of_each(layers[index], width_E)
    return Plan(layers=kept)


def _rounded_widths(scores_EF: Tensor, width_E: Tensor, budget: Budget) -> Tensor:
    """Multiples below or above the widths, so that a layer's total changes by at most one multiple (more only
    where K experts would not be left). The experts whose next atomic experts score highest in sum are rounded
    up."""
    multiple = budget.width_multiple
    lower_E = width_E // multiple * multiple
    is_between_E = lower_E < width_E
    would_be_empty_E = is_between_E & (lower_E == 0)
    gain_E = _gain(scores_EF, lower_E, multiple).masked_fill(~is_between_E, -math.inf)

    num_up = round_half_up(int((width_E - lower_E).sum()) / multiple)
    num_present = int((width_E > 0).sum())
    num_needed = min(budget.experts_per_token, num_present)
    num_forced = max(0, num_needed - int((lower_E > 0).sum()))
    forced = highest(gain_E.masked_fill(~would_be_empty_E, -math.inf), num_forced)
    others = [expert for expert in highest(gain_E, num_up) if expert not in forced]
    num_others = max(0, num_up - num_forced)

    rounded_E = lower_E.clone()
    rounded_E[forced + others[:num_others]] += multiple
    return rounded_E


def _gain(scores_EF: Tensor, width_E: Tensor, multiple: int) -> Tensor:
    """Sum of the scores of each expert's next `multiple` atomic experts after its best `width_E`."""
    sorted_EF = torch.sort(scores_EF, dim=1, descending=True, stable=True).values
    total_EW = torch.nn.functional.pad(sorted_EF.cumsum(dim=1), (1, 0))  # of the best 0, 1, 2, ...
    next_E = (width_E + multiple).clamp(max=scores_EF.shape[1])
    total_E1 = total_EW.gather(1, width_E.unsqueeze(1))
    next_total_E1 = total_EW.gather(1, next_E.unsqueeze(1))
    return (next_total_E1 - total_E1).squeeze(1)
