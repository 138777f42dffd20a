"""Allocation where atomic experts cost something: those with the lowest scores for their cost go.

In: scores and costs. Out: a `Plan`. docs/method.md, 17.
Shape letters: E experts, F atomic experts of the widest expert, C items of an expert, S items of a layer or
of several.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from heapr.pruning.budget import Budget, Costs, Widths, cost_of_layer
from heapr.pruning.ranking import keep_best_of_each, protect
from heapr.types import Plan

NEXT_TO_NOTHING = 1e-12  # of the largest cost: what experts that no token reached cost in a division
ROUNDING_ERROR = 1e-9  # relative, of sums of costs


@dataclass(frozen=True)
class _Items:
    """What a layer may lose. One item is `width_multiple` atomic experts of an expert, its lowest first.

    Attributes:
        expert_S: the expert of each item.
        rate_S: score for cost.
        cost_S: cost.
        size: cost of the whole layer, with what must stay.
        is_protected: whether nothing of it may go.
    """

    expert_S: Tensor
    rate_S: Tensor
    cost_S: Tensor
    size: float
    is_protected: bool


def allocate_by_cost(layers: Mapping[int, Tensor], widths: Widths, budget: Budget, costs: Costs) -> Plan:
    """A plan that removes what scores lowest for its cost until the cost removed is as near to the ratio as
    it comes (the smaller of two equally near costs). Layers ("layer") lose the same share of their cost, to
    within half an item.

    The items whose score s_i and cost c_i have s_i / c_i < v are those that minimise the sum of s_i - v c_i
    over what goes. So nothing else of the same or a higher cost has a lower sum of scores, and the cost is at
    most half of the costliest item from the one asked for.

    Raises:
        ConfigError: what must stay leaves less to remove than that.
    """
    largest = max(float(cost_E.max()) for cost_E in costs.values())
    least = NEXT_TO_NOTHING * largest
    items = {}
    for index, scores_EF in layers.items():
        rates_EF = scores_EF / costs[index].clamp(min=least).unsqueeze(1)
        items[index] = _items_of(index, rates_EF, widths[index], costs[index], budget)
    stays = _remove(list(items.values()), budget)
    half = budget.width_multiple * largest / 2
    if not _is_reached(list(items.values()), stays, budget, half):
        raise budget.too_little_left()
    kept = {}
    for (index, of_layer), stays_S in zip(items.items(), stays, strict=True):
        num_gone_E = torch.bincount(of_layer.expert_S[~stays_S], minlength=len(widths[index]))
        width_E = torch.tensor(widths[index]) - budget.width_multiple * num_gone_E
        kept[index] = keep_best_of_each(layers[index], width_E)
    return Plan(layers=kept)


def _items_of(index: int, rates_EF: Tensor, width_E: Sequence[int], cost_E: Tensor, budget: Budget) -> _Items:
    """The items of a layer, from the score for cost of each of its atomic experts and the cost of one of each
    expert."""
    sorted_EF = protect(rates_EF, index, budget).sort(dim=1).values
    rate_EC = sorted_EF.view(len(cost_E), -1, budget.width_multiple).mean(dim=-1)
    is_free_EC = rate_EC.isfinite()  # infinite where it must stay, -inf where there is none
    expert_S = is_free_EC.nonzero()[:, 0]
    return _Items(
        expert_S=expert_S,
        rate_S=rate_EC[is_free_EC],
        cost_S=budget.width_multiple * cost_E[expert_S],
        size=cost_of_layer(cost_E, width_E),
        is_protected=index in budget.protected_layers,
    )


def _remove(items: Sequence[_Items], budget: Budget) -> Sequence[Tensor]:
    """Masks of the items that stay, layer by layer, when they go in order until the cost removed is nearest
    to the budget."""
    if budget.scope == "global":
        order_S = torch.sort(torch.cat([each.rate_S for each in items]), stable=True).indices
    else:
        order_S = _order_by_share(items)
    cost_S = torch.cat([each.cost_S for each in items])
    wanted = budget.ratio * sum(each.size for each in items)
    removed_S = torch.nn.functional.pad(cost_S[order_S].cumsum(0), (1, 0))  # by the first 0, 1, 2, ... items
    miss_S = (removed_S - wanted).abs()
    number = int((miss_S == miss_S.min()).nonzero()[0])
    stays_S = torch.ones(len(cost_S), dtype=torch.bool)
    stays_S[order_S[:number]] = False
    stays: Sequence[Tensor] = stays_S.split([len(each.cost_S) for each in items])
    return stays


def _order_by_share(items: Sequence[_Items]) -> Tensor:
    """The order in which the items of all layers go so that layers lose the same share.

    Inside a layer items go by rate. An item of cost c before which b of a layer's cost s has gone comes at
    the share (b + c/2) / s.
    """
    orders, shares, offset = [], [], 0
    for each in items:
        order_S = torch.sort(each.rate_S, stable=True).indices
        cost_S = each.cost_S[order_S]
        middle_S = cost_S.cumsum(0) - cost_S / 2
        orders.append(offset + order_S)
        shares.append(middle_S / max(each.size, torch.finfo(torch.float64).tiny))
        offset += len(order_S)
    by_share_S = torch.sort(torch.cat(shares), stable=True).indices
    return torch.cat(orders)[by_share_S]


def _is_reached(items: Sequence[_Items], stays: Sequence[Tensor], budget: Budget, half: float) -> bool:
    """Whether the cost removed is no further below the one asked for than half an item; with scope "layer",
    whether the same holds for each layer that has nothing left to remove."""
    tolerance = half * (1 + ROUNDING_ERROR)
    wanted = budget.ratio * sum(each.size for each in items)
    removed = [float(each.cost_S[~stays_S].sum()) for each, stays_S in zip(items, stays, strict=True)]
    if budget.scope == "global":
        return wanted - sum(removed) <= tolerance
    free = sum(each.size for each in items if not each.is_protected)
    for each, stays_S, gone in zip(items, stays, removed, strict=True):
        is_exhausted = not (each.is_protected or stays_S.any())
        if is_exhausted and wanted * each.size / free - gone > tolerance:
            return False
    return True
