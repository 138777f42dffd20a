"""Allocation by cost: removes the atomic experts with the lowest score per cost (docs/method.md, 17).

In: scores and costs. Out: a `Plan`.
Shape letters: E experts, F atomic experts of the widest expert, C items of an expert, S items of one or more
layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from heapr.pruning.budget import Budget, Costs, Widths, cost_of_layer
from heapr.pruning.ranking import keep_best_of_each, lowest_first, protect
from heapr.types import Plan

# The least cost to divide by, as a share of the largest: experts that no token reached cost nothing.
NEXT_TO_NOTHING = 1e-12
ROUNDING_ERROR = 1e-9  # relative, of sums of costs


@dataclass(frozen=True)
class _Items:
    """What a layer may lose. An item is `width_multiple` atomic experts of one expert.

    Attributes:
        expert_S: the expert of each item.
        rate_S: score per cost of each item.
        cost_S: cost of each item.
        size: cost of the whole layer, including what must stay.
        is_protected: whether the layer is protected.
    """

    expert_S: Tensor
    rate_S: Tensor
    cost_S: Tensor
    size: float
    is_protected: bool


def allocate_by_cost(layers: Mapping[int, Tensor], widths: Widths, budget: Budget, costs: Costs) -> Plan:
    """Return the plan that removes the lowest scores per cost, with a cost as near to the ratio as possible.

    Of two equally near costs, the smaller is removed. With scope "layer", all layers lose the same share of
    their cost, to within half an item.

    With scores s_i and costs c_i, removing all items with s_i / c_i < v minimizes the sum of s_i - v c_i over
    the removed items. So for v >= 0, no other set of the same or a higher cost has a lower sum of scores. The
    cost differs from the requested one by at most half of the costliest item.

    Raises:
        ConfigError: what must stay leaves less to remove than that.
    """
    largest = max(float(cost_E.max()) for cost_E in costs.values())
    least = NEXT_TO_NOTHING * largest
    items = []
    for index, scores_EF in layers.items():
        cost_E = costs[index]
        divisor_E1 = cost_E.clamp(min=least).unsqueeze(1)
        rates_EF = scores_EF / divisor_E1
        of_layer = _items_of(index, rates_EF, widths[index], cost_E, budget)
        items.append(of_layer)
    stays = _remove(items, budget)
    half = budget.width_multiple * largest / 2
    if not _is_reached(items, stays, budget, half):
        raise budget.too_little_left()
    kept = {}
    for (index, scores_EF), of_layer, stays_S in zip(layers.items(), items, stays, strict=True):
        gone_S = of_layer.expert_S[~stays_S]
        num_items_E = torch.bincount(gone_S, minlength=len(scores_EF))
        num_gone_E = budget.width_multiple * num_items_E
        width_E = torch.tensor(widths[index]) - num_gone_E
        kept[index] = keep_best_of_each(scores_EF, width_E)
    return Plan(layers=kept)


def _items_of(index: int, rates_EF: Tensor, width_E: Sequence[int], cost_E: Tensor, budget: Budget) -> _Items:
    """The items of a layer.

    Args:
        index: of the decoder layer.
        rates_EF: score per cost of each atomic expert.
        width_E: atomic experts of each expert.
        cost_E: cost of one atomic expert of each expert.
        budget: how much to remove.
    """
    multiple = budget.width_multiple
    protected_EF = protect(rates_EF, index, budget)
    sorted_EF = protected_EF.sort(dim=1).values
    rate_EC = sorted_EF.view(len(cost_E), -1, multiple).mean(dim=-1)
    # Infinite where atomic experts must stay, -inf beyond the expert's width.
    is_free_EC = rate_EC.isfinite()
    expert_S = is_free_EC.nonzero()[:, 0]
    return _Items(
        expert_S=expert_S,
        rate_S=rate_EC[is_free_EC],
        cost_S=multiple * cost_E[expert_S],
        size=cost_of_layer(cost_E, width_E),
        is_protected=index in budget.protected_layers,
    )


def _remove(items: Sequence[_Items], budget: Budget) -> Sequence[Tensor]:
    """Remove items in order until the cost removed is nearest to the budget.

    Returns:
        a mask of the items that stay, for each layer.
    """
    if budget.scope == "global":
        rates = [each.rate_S for each in items]
        order_S = lowest_first(torch.cat(rates))
    else:
        order_S = _order_by_share(items)
    costs = [each.cost_S for each in items]
    cost_S = torch.cat(costs)
    wanted = _cost_wanted(items, budget)
    # Cost of the first 0, 1, 2, ... items.
    total_S = cost_S[order_S].cumsum(0)
    removed_S = F.pad(total_S, (1, 0))
    miss_S = (removed_S - wanted).abs()
    is_nearest_S = miss_S == miss_S.min()
    number = int(is_nearest_S.nonzero()[0])
    stays_S = torch.ones(len(cost_S), dtype=torch.bool)
    stays_S[order_S[:number]] = False
    sizes = [len(of_layer_S) for of_layer_S in costs]
    stays: Sequence[Tensor] = stays_S.split(sizes)
    return stays


def _cost_wanted(items: Sequence[_Items], budget: Budget) -> float:
    """The cost that the ratio asks to remove."""
    return budget.ratio * sum(each.size for each in items)


def _order_by_share(items: Sequence[_Items]) -> Tensor:
    """The order in which items are removed such that all layers lose the same share of their cost.

    Inside a layer, items are ordered by rate. An item of cost c is placed at the share (b + c/2) / s, where b
    is the cost of the items before it and s the cost of the whole layer.
    """
    orders = []
    shares = []
    offset = 0
    for each in items:
        order_S = lowest_first(each.rate_S)
        cost_S = each.cost_S[order_S]
        middle_S = cost_S.cumsum(0) - cost_S / 2
        size = max(each.size, torch.finfo(torch.float64).tiny)
        orders.append(offset + order_S)
        shares.append(middle_S / size)
        offset += len(order_S)
    by_share_S = lowest_first(torch.cat(shares))
    return torch.cat(orders)[by_share_S]


def _is_reached(items: Sequence[_Items], stays: Sequence[Tensor], budget: Budget, half: float) -> bool:
    """Whether the cost removed falls short of the requested one by at most half an item.

    With scope "layer", this must hold for each layer that has nothing left to remove.
    """
    tolerance = half * (1 + ROUNDING_ERROR)
    wanted = _cost_wanted(items, budget)
    removed = []
    for each, stays_S in zip(items, stays, strict=True):
        gone_S = each.cost_S[~stays_S]
        removed.append(float(gone_S.sum()))
    if budget.scope == "global":
        return wanted - sum(removed) <= tolerance
    free = sum(each.size for each in items if not each.is_protected)
    if free == 0:
        # No token reached the layers that may lose something.
        return wanted <= tolerance
    for each, stays_S, gone in zip(items, stays, removed, strict=True):
        is_exhausted = not (each.is_protected or stays_S.any())
        wanted_here = wanted * each.size / free
        if is_exhausted and wanted_here - gone > tolerance:
            return False
    return True
