"""Allocation: from scores to a plan. Decides how many atomic or whole experts are removed, and where.

In: scores, the widths of the scored experts, a budget, and costs if the budget is not counted in atomic
experts. Out: a `Plan`. Needs no model.
Shape letters: E experts, F atomic experts of the widest expert, K experts per token, S scores of several
experts, W = F + 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from heapr.pruning.allocation_by_cost import allocate_by_cost
from heapr.pruning.allocation_of_layer_widths import allocate_layer_widths
from heapr.pruning.allocation_of_whole_experts import allocate_whole_experts
from heapr.pruning.budget import Budget, Costs, Widths
from heapr.pruning.ranking import (
    highest,
    keep_best_of_each,
    keep_highest,
    keep_number_of_each,
    lowest_first,
    only_existing,
    protect,
)
from heapr.pruning.rounding import round_half_up
from heapr.types import Granularity, Plan, Scores


def allocate(scores: Scores, widths: Widths, budget: Budget, costs: Costs | None = None) -> Plan:
    """Return the plan that removes the lowest scores, or the lowest scores per cost.

    Whole experts are removed if the budget's granularity says so. Equal scores are removed in order of layer,
    expert and atomic expert. The best atomic expert of each layer's K best experts always stays (with whole
    experts: the K best experts of each layer), as does everything in protected layers.

    Plans are nested: what one ratio removes, every higher ratio removes too. The one exception is widths
    rounded to multiples without costs. There, a layer's leftover multiples go to the experts that gain most
    from them, and an expert may win one only at the higher ratio.

    Args:
        scores: bigger is more important. Entries beyond an expert's width are ignored.
        widths: of the scored experts.
        budget: how much to remove.
        costs: `costs_of` the budget's unit.

    Raises:
        ConfigError: see `Budget.check`; or the costs do not let the ratio be reached.
    """
    assert (costs is None) == (budget.unit == "atomic_experts"), budget.unit
    layers = {}
    for index, scores_EF in scores.layers.items():
        layers[index] = only_existing(scores_EF, widths[index])
    if costs is not None:
        return allocate_by_cost(layers, widths, budget, costs)
    if budget.granularity is Granularity.EXPERT:
        return allocate_whole_experts(layers, widths, budget)
    if budget.uniform_width is not None:
        return _uniform(layers, budget.uniform_width)
    if budget.one_width_per_layer:
        return allocate_layer_widths(layers, budget)
    exact = _exact(layers, widths, budget)
    if budget.width_multiple == 1:
        return exact
    return _round_widths(exact, layers, budget)


def _uniform(layers: Mapping[int, Tensor], width: int) -> Plan:
    """Keep the `width` best atomic experts of every expert."""
    kept = {}
    for index, scores_EF in layers.items():
        kept[index] = keep_number_of_each(scores_EF, width)
    return Plan(layers=kept)


def _exact(layers: Mapping[int, Tensor], widths: Widths, budget: Budget) -> Plan:
    """Remove exactly round(ratio * number of atomic experts), whatever the scope."""
    protected = {}
    of_layers = {}
    for index, scores_EF in layers.items():
        protected[index] = protect(scores_EF, index, budget)
        of_layers[index] = widths[index]
    numbers = budget.numbers_removed(of_layers)
    if budget.scope == "global":
        return Plan(layers=_remove_lowest(protected, numbers[0]))
    kept: dict[int, Tensor] = {}
    for (index, scores_EF), number in zip(protected.items(), numbers, strict=True):
        if budget.scope == "layer":
            of_layer = {index: scores_EF}
            kept |= _remove_lowest(of_layer, number)
        else:
            width_E = torch.tensor(widths[index])
            kept[index] = _remove_same_share(scores_EF, width_E, number)
    return Plan(layers=kept)


def _remove_lowest(layers: Mapping[int, Tensor], number: int) -> dict[int, Tensor]:
    """Rank all given layers together and return their masks without the `number` lowest atomic experts."""
    flat = [scores_EF.flatten() for scores_EF in layers.values()]
    scores_S = torch.cat(flat)
    # Entries beyond an expert's width are -inf and sort first.
    is_absent_S = scores_S == -math.inf
    num_absent = int(is_absent_S.sum())
    kept_S = keep_highest(scores_S, num_absent + number)
    sizes = [len(part_S) for part_S in flat]
    parts = kept_S.split(sizes)
    kept = {}
    for (index, scores_EF), part_S in zip(layers.items(), parts, strict=True):
        kept[index] = part_S.view_as(scores_EF)
    return kept


def _remove_same_share(scores_EF: Tensor, width_E: Tensor, number: int) -> Tensor:
    """Mask of a layer in which all experts lose the same share, `number` atomic experts in total.

    The j-th lowest atomic expert of an expert of width w is placed at the share (j - 1/2) / w, and those that
    must stay at infinity. The first `number` are removed; of equal shares, the lowest score first.
    """
    num_experts, widest = scores_EF.shape
    width_E1 = width_E.unsqueeze(1)
    sorted_EF = torch.sort(scores_EF, dim=1, stable=True).values
    # j - 1, and negative for entries beyond the expert's width: these are -inf and sort first.
    place_F = torch.arange(widest)
    rank_EF = place_F - (widest - width_E1)
    share_EF = (rank_EF.double() + 0.5) / width_E1.clamp(min=1)
    share_EF[sorted_EF == math.inf] = math.inf

    by_score_S = lowest_first(sorted_EF.flatten())
    share_S = share_EF.flatten()[by_score_S]
    by_share_S = lowest_first(share_S)
    order_S = by_score_S[by_share_S]

    num_absent = int((rank_EF < 0).sum())
    removed_S = order_S[: num_absent + number]
    expert_S = removed_S // widest
    num_removed_E = torch.bincount(expert_S, minlength=num_experts)
    return keep_best_of_each(scores_EF, widest - num_removed_E)


def _round_widths(plan: Plan, layers: Mapping[int, Tensor], budget: Budget) -> Plan:
    """Round every expert's width to a multiple and keep its best atomic experts."""
    kept = {}
    for index, kept_EF in plan.layers.items():
        scores_EF = layers[index]
        exact_E = kept_EF.sum(dim=1)
        width_E = _rounded_widths(scores_EF, exact_E, budget)
        kept[index] = keep_best_of_each(scores_EF, width_E)
    return Plan(layers=kept)


def _rounded_widths(scores_EF: Tensor, width_E: Tensor, budget: Budget) -> Tensor:
    """Round the widths of a layer down or up to multiples.

    The layer's total changes by at most one multiple, unless fewer than K experts would be left. The experts
    whose next atomic experts have the highest total score are rounded up.
    """
    multiple = budget.width_multiple
    lower_E = width_E // multiple * multiple
    is_between_E = lower_E < width_E
    would_be_empty_E = is_between_E & (lower_E == 0)
    gain_E = _gain(scores_EF, lower_E, multiple)
    gain_E = gain_E.masked_fill(~is_between_E, -math.inf)
    forced_gain_E = gain_E.masked_fill(~would_be_empty_E, -math.inf)

    left_over_E = width_E - lower_E
    num_left_over = int(left_over_E.sum())
    num_up = round_half_up(num_left_over / multiple)
    num_needed = min(budget.experts_per_token, _num_above_zero(width_E))
    num_not_empty = _num_above_zero(lower_E)
    num_forced = max(0, num_needed - num_not_empty)
    forced = highest(forced_gain_E, num_forced)
    others = [expert for expert in highest(gain_E, num_up) if expert not in forced]
    num_others = max(0, num_up - num_forced)

    rounded_up = forced + others[:num_others]
    rounded_E = lower_E.clone()
    rounded_E[rounded_up] += multiple
    return rounded_E


def _num_above_zero(width_E: Tensor) -> int:
    return int((width_E > 0).sum())


def _gain(scores_EF: Tensor, width_E: Tensor, multiple: int) -> Tensor:
    """Sum of the scores of each expert's next `multiple` atomic experts after its best `width_E`."""
    sorted_EF = torch.sort(scores_EF, dim=1, descending=True, stable=True).values
    # Sums of the best 0, 1, 2, ... scores.
    total_EW = F.pad(sorted_EF.cumsum(dim=1), (1, 0))
    widest = scores_EF.shape[1]
    width_E1 = width_E.unsqueeze(1)
    next_E1 = (width_E1 + multiple).clamp(max=widest)
    now_E1 = total_EW.gather(1, width_E1)
    then_E1 = total_EW.gather(1, next_E1)
    gain_E1 = then_E1 - now_E1
    return gain_E1.squeeze(1)
