"""Allocation: from scores to a plan. How many atomic or whole experts go, and where; nothing about models.

In: scores, the widths of the experts they belong to, a budget, and costs where it is not counted in atomic experts. Out: a `Plan`.
Shape letters: E experts, F atomic experts of the widest expert, K experts per token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from heapr.pruning.budget import Budget, Costs, Widths, round_half_up
from heapr.types import Granularity, Plan, Scores

NEXT_TO_NOTHING = 1e-12  # of the largest cost: what experts that no token reached cost in a division


def allocate(scores: Scores, widths: Widths, budget: Budget, costs: Costs | None = None) -> Plan:
    """Remove the lowest-scoring atomic experts, the lowest-scoring for what they cost, or the lowest-scoring whole experts.

    Equal scores are removed in order of layer, expert and atomic expert. The best atomic expert of each layer's K best
    experts always stays; of whole experts, each layer's K best; and whatever the budget's guards say.

    Args:
        scores: bigger is more important. What lies beyond an expert's width is ignored.
        widths: of the scored experts.
        budget: how much.
        costs: `costs_of` the budget's unit.

    Raises:
        ConfigError: see `Budget.check`; or costs are such that the ratio cannot be reached.
    """
    assert (costs is None) == (budget.unit == "atomic_experts"), budget.unit
    existing = {
        index: scores_EF.double().masked_fill(~_exists(scores_EF, widths[index]), -math.inf) for index, scores_EF in scores.layers.items()
    }
    layers = temper(existing, budget.guards.tempering)
    if costs is not None:
        return _by_cost(layers, widths, budget, costs)
    if budget.granularity is Granularity.EXPERT:
        return _whole_experts(layers, widths, budget)
    if budget.is_uniform:
        width = budget.uniform_width(widths)
        return Plan(layers={index: _keep_best_of_each(scores_EF, [width] * len(scores_EF)) for index, scores_EF in layers.items()})
    exact = _exact(layers, widths, budget)
    return exact if budget.width_multiple == 1 else _round_widths(exact, layers, budget)


def temper(layers: Mapping[int, Tensor], tempering: float) -> dict[int, Tensor]:
    """Scores with layers brought nearer to each other: those of layer l times (m / m_l)^t.

    m_l is the mean of the layer's scores that are not negative (below 0 are experts that no token reached), m the mean of all
    m_l, t the tempering; a layer with m_l = 0 keeps its scores. t = 0 changes nothing, t = 1 makes all m_l equal. Rankings
    inside a layer stay.

    Args:
        layers: scores (E, F), -inf where there is no atomic expert.
        tempering: t, in [0, 1].
    """
    means = {index: float(scores_EF[scores_EF >= 0].mean()) for index, scores_EF in layers.items() if (scores_EF > 0).any()}
    factors = {index: (sum(means.values()) / len(means) / mean) ** tempering for index, mean in means.items()}
    return {index: scores_EF * factors.get(index, 1.0) for index, scores_EF in layers.items()}


def _exact(layers: Mapping[int, Tensor], widths: Widths, budget: Budget) -> Plan:
    """A plan that removes exactly round(ratio * number of atomic experts), whatever the scope."""
    exists = {index: scores_EF > -math.inf for index, scores_EF in layers.items()}
    protected = {index: _protect(scores_EF, index, widths, budget) for index, scores_EF in layers.items()}
    numbers = budget.numbers_removed({index: widths[index] for index in layers})
    if budget.scope == "global":
        ranked = [protected[index][exists_EF] for index, exists_EF in exists.items()]
        kept_flat = _keep_highest(torch.cat(ranked), numbers[0]).split([len(scores_S) for scores_S in ranked])
    elif budget.scope == "layer":
        kept_flat = tuple(_keep_highest(protected[i][exists[i]], number) for i, number in zip(exists, numbers, strict=True))
    else:
        removed = {i: _share_among_experts(protected[i], widths[i], number) for i, number in zip(exists, numbers, strict=True)}
        kept = {i: [w - r for w, r in zip(widths[i], removed[i], strict=True)] for i in exists}
        return Plan(layers={i: _keep_best_of_each(protected[i], kept[i]) for i in exists})
    return Plan(layers={index: _scatter(kept_S, exists_EF) for kept_S, (index, exists_EF) in zip(kept_flat, exists.items(), strict=True)})


def _by_cost(layers: Mapping[int, Tensor], widths: Widths, budget: Budget, costs: Costs) -> Plan:
    """A plan that removes what scores lowest for its cost until the cost removed is as near to the ratio as it comes (of two
    equally near ones the smaller). What a layer ("layer") loses too much or too little is made up for by the next one.

    One item are `width_multiple` atomic experts of an expert, its lowest first. The items whose score s_i and cost c_i have
    s_i / c_i below a multiplier are those that minimise the sum of s_i - multiplier * c_i over what goes. So nothing else of the same or
    a higher cost has a lower sum of scores, and the cost is at most half an item from the one asked for. (Where a layer's floor
    holds, this is so of the items above the floor, which is made of the highest scores for their cost.)
    """
    rates = {index: _rates_of_items(scores_EF, index, widths, budget, costs) for index, scores_EF in layers.items()}
    item_costs = {index: (budget.width_multiple * costs[index]).unsqueeze(1).expand_as(rates[index]) for index in layers}
    largest = max(float(cost_EC.max()) for cost_EC in item_costs.values())
    ends = budget.shares_removed({index: float((costs[index] * torch.tensor(widths[index])).sum()) for index in layers})
    by_layer = [([index], end) for index, end in zip(layers, ends, strict=True)]
    kept, removed = {}, 0.0
    for group, wanted in [(list(layers), ends[-1])] if budget.scope == "global" else by_layer:
        free = [rates[index].isfinite() for index in group]
        rate_S = torch.cat([rates[index][free_EC] for index, free_EC in zip(group, free, strict=True)])
        cost_S = torch.cat([item_costs[index][free_EC] for index, free_EC in zip(group, free, strict=True)])
        stays_S, removed = _until(wanted, rate_S, cost_S, removed)
        if wanted - removed > largest:
            raise budget.too_little_left()
        for index, free_EC, stays in zip(group, free, stays_S.split([int(free_EC.sum()) for free_EC in free]), strict=True):
            kept_E = torch.tensor(widths[index]) - budget.width_multiple * _scatter(~stays, free_EC).sum(dim=1)
            kept[index] = _keep_best_of_each(layers[index], kept_E.tolist())
    return Plan(layers=kept)


def _rates_of_items(scores_EF: Tensor, index: int, widths: Widths, budget: Budget, costs: Costs) -> Tensor:
    """Mean score for cost of each item of a layer, lowest first: infinite where it stays, -inf where there is none."""
    cost_E = costs[index].clamp(min=NEXT_TO_NOTHING * max(float(cost_E.max()) for cost_E in costs.values()))
    rates_EF = _protect(scores_EF / cost_E.unsqueeze(1), index, widths, budget)
    return rates_EF.sort(dim=1).values.view(len(rates_EF), -1, budget.width_multiple).mean(dim=-1)


def _until(wanted: float, rate_S: Tensor, cost_S: Tensor, removed: float) -> tuple[Tensor, float]:
    """Mask of the items that stay when the lowest rates go until the cost removed, so much already, is nearest to the wanted one;
    and that cost."""
    order_S = torch.sort(rate_S, stable=True).indices
    total_S = removed + torch.nn.functional.pad(cost_S[order_S].cumsum(0), (1, 0))
    miss_S = (total_S - wanted).abs()
    number = int((miss_S == miss_S.min()).nonzero()[0])
    stays_S = torch.ones(len(rate_S), dtype=torch.bool)
    stays_S[order_S[:number]] = False
    return stays_S, float(total_S[number])


def _whole_experts(layers: Mapping[int, Tensor], widths: Widths, budget: Budget) -> Plan:
    """A plan that keeps or removes experts as a whole, in number as near to the ratio as they come (of two equally near numbers
    the larger). What a layer ("layer") loses too much or too little is made up for by the next one."""
    kept = {index: scores_EF > -math.inf for index, scores_EF in layers.items()}
    wanted, removed = 0.0, 0
    for group in [list(layers)] if budget.scope == "global" else [[index] for index in layers]:
        wanted += budget.ratio * sum(sum(widths[index]) for index in group)
        removable = sorted(expert for index in group for expert in _removable(layers[index], index, budget.experts_per_token))
        totals = list(accumulate((widths[index][expert] for _, index, expert in removable), initial=removed))
        number = min(range(len(totals)), key=lambda number: (abs(totals[number] - wanted), -number))
        for _, index, expert in removable[:number]:
            kept[index][expert] = False
        removed = totals[number]
    return Plan(layers=kept)


def _removable(scores_EF: Tensor, index: int, experts_per_token: int) -> list[tuple[float, int, int]]:
    """Score, layer and expert of those that have atomic experts and are not among the K best."""
    score_E = scores_EF.amax(dim=1)
    best = _highest(score_E, experts_per_token)
    return [(score, index, expert) for expert, score in enumerate(score_E.tolist()) if score > -math.inf and expert not in best]


def _round_widths(plan: Plan, scored: Mapping[int, Tensor], budget: Budget) -> Plan:
    """Round every expert's width down or up to a multiple, so that a layer's total changes by at most one multiple (more
    only where K experts would not be left). Up go the experts whose next atomic experts score highest in sum."""
    multiple, layers = budget.width_multiple, {}
    for index, kept_EF in plan.layers.items():
        width_E = kept_EF.sum(dim=1)
        floor_E = width_E // multiple * multiple
        sorted_EF = scored[index].sort(dim=1, descending=True, stable=True).values
        padded_EF = torch.nn.functional.pad(sorted_EF.cumsum(dim=1), (1, 0))
        next_E = (floor_E + multiple).clamp(max=kept_EF.shape[1])
        gain_E = (padded_EF.gather(1, next_E.unsqueeze(1)) - padded_EF.gather(1, floor_E.unsqueeze(1))).squeeze(1)
        gain_E[floor_E == width_E] = -math.inf
        empty_E = (floor_E == 0) & (width_E > 0)
        num_up = round_half_up(int((width_E - floor_E).sum()) / multiple)
        num_forced = max(0, min(budget.experts_per_token, int((width_E > 0).sum())) - int((floor_E > 0).sum()))
        up = _highest(gain_E.masked_fill(~empty_E, -math.inf), num_forced)
        up += [expert for expert in _highest(gain_E, num_up) if expert not in up][: max(0, num_up - num_forced)]
        floor_E[up] += multiple
        layers[index] = _keep_best_of_each(scored[index], floor_E.tolist())
    return Plan(layers=layers)


def _exists(scores_EF: Tensor, width_E: Sequence[int]) -> Tensor:
    """Mask (E, F) of the atomic experts that there are."""
    return torch.arange(scores_EF.shape[1]) < torch.tensor(width_E).unsqueeze(1)


def _protect(scores_EF: Tensor, index: int, widths: Widths, budget: Budget) -> Tensor:
    """Scores with those raised to infinity that stay: the best atomic expert (the first of equals) of the K best experts, the best
    of each expert up to its floor, and of the others the best of the layer up to the layer's."""
    protected_EF = scores_EF.clone()
    for expert in _highest(scores_EF.amax(dim=1), budget.experts_per_token):
        protected_EF[expert, scores_EF[expert].argmax()] = math.inf
    protected_EF[_keep_best_of_each(protected_EF, budget.expert_floors(index, widths[index]))] = math.inf
    num_below = protected_EF.numel() - budget.layer_floor(index, widths[index])
    protected_EF[_keep_highest(protected_EF.flatten(), num_below).view_as(protected_EF)] = math.inf
    return protected_EF


def _highest(score_E: Tensor, number: int) -> list[int]:
    """The experts of highest score; of equals the first."""
    experts: list[int] = torch.sort(score_E, descending=True, stable=True).indices[:number].tolist()
    return experts


def _keep_highest(scores_S: Tensor, num_removed: int) -> Tensor:
    """Mask without the lowest scores; of equal ones the first go."""
    kept_S = torch.ones(len(scores_S), dtype=torch.bool)
    kept_S[torch.sort(scores_S, stable=True).indices[:num_removed]] = False
    return kept_S


def _keep_best_of_each(scores_EF: Tensor, width_E: Sequence[int]) -> Tensor:
    """Mask of every expert's best atomic experts; of equal ones the last stay."""
    num_removed = [scores_EF.shape[1] - width for width in width_E]
    return torch.stack([_keep_highest(scores_F, number) for scores_F, number in zip(scores_EF, num_removed, strict=True)])


def _scatter(kept_S: Tensor, exists_EF: Tensor) -> Tensor:
    kept_EF = torch.zeros_like(exists_EF)
    kept_EF[exists_EF] = kept_S
    return kept_EF


def _share_among_experts(scores_EF: Tensor, width_E: Sequence[int], num_removed: int) -> list[int]:
    """Every expert loses the same share; what does not divide is taken from those whose next atomic expert scores lowest."""
    base_E = [num_removed * width // sum(width_E) for width in width_E]
    sorted_EF = scores_EF.sort(dim=1).values
    first_E = [scores_EF.shape[1] - width for width in width_E]  # what does not exist sorts first
    next_E = torch.stack(
        [
            sorted_F[first + base] if base < width else sorted_F.new_tensor(math.inf)
            for sorted_F, first, base, width in zip(sorted_EF, first_E, base_E, width_E, strict=True)
        ]
    )
    for expert in torch.sort(next_E, stable=True).indices[: num_removed - sum(base_E)].tolist():
        base_E[expert] += 1
    return base_E
