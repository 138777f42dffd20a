"""Allocation: from scores to a plan. How many atomic or whole experts go, and where; nothing about models.

In: scores, the widths of the experts they belong to, a budget, and costs where it is not counted in atomic experts. Out: a `Plan`.
Shape letters: E experts, F atomic experts of the widest expert, K experts per token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from heapr.pruning.budget import ROUNDING_ERROR, Budget, Costs, Widths, round_half_up
from heapr.types import Granularity, Plan, Scores

NEXT_TO_NOTHING = 1e-12  # of the largest cost: what experts that no token reached cost in a division


def allocate(scores: Scores, widths: Widths, budget: Budget, costs: Costs | None = None) -> Plan:
    """Remove the lowest-scoring atomic experts, the lowest-scoring for what they cost, or the lowest-scoring whole experts.

    Equal scores are removed in order of layer, expert and atomic expert. The best atomic expert of each layer's K best
    experts always stays; of whole experts, each layer's K best; and whatever the budget's guards say.

    What a ratio removes, every higher one removes too: there is one order in which things go, and a ratio says how far. Only widths
    rounded to multiples are not so nested, except with costs: an expert is rounded up when it wins the multiple that its layer has
    left over, and more removed elsewhere may let it win.

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
    if (width := budget.uniform_width) is not None:
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
    equally near ones the smaller). Layers ("layer") then lose the same share of their cost, to within half an item.

    One item are `width_multiple` atomic experts of an expert, its lowest first. The items whose score s_i and cost c_i have
    s_i / c_i below a multiplier are those that minimise the sum of s_i - multiplier * c_i over what goes. So nothing else of the same or
    a higher cost has a lower sum of scores, and the cost is at most half of the costliest item from the one asked for. (Where a layer's
    floor holds, this is so of the items above the floor, which is made of the highest scores for their cost.)

    Raises:
        ConfigError: what must stay leaves less to remove than that.
    """
    rates = {index: _rates_of_items(scores_EF, index, widths, budget, costs) for index, scores_EF in layers.items()}
    free = {index: rate_EC.isfinite() for index, rate_EC in rates.items()}
    rates_S, costs_S = [], []
    for index, free_EC in free.items():
        rates_S.append(rates[index][free_EC])
        costs_S.append((budget.width_multiple * costs[index]).unsqueeze(1).expand_as(free_EC)[free_EC])
    sizes = [float((costs[index] * torch.tensor(widths[index])).sum()) for index in layers]
    is_global = budget.scope == "global"
    order_S = torch.sort(torch.cat(rates_S), stable=True).indices if is_global else _order_by_share(rates_S, costs_S, sizes)
    stays = _until(budget.ratio * sum(sizes), order_S, torch.cat(costs_S)).split([len(cost_S) for cost_S in costs_S])
    half = budget.width_multiple * max(float(cost_E.max()) for cost_E in costs.values()) / 2
    if not _is_reached(budget, dict(zip(layers, sizes, strict=True)), stays, costs_S, half):
        raise budget.too_little_left()
    kept = {}
    for (index, free_EC), stays_S in zip(free.items(), stays, strict=True):
        kept_E = torch.tensor(widths[index]) - budget.width_multiple * _scatter(~stays_S, free_EC).sum(dim=1)
        kept[index] = _keep_best_of_each(layers[index], kept_E.tolist())
    return Plan(layers=kept)


def _order_by_share(rates: Sequence[Tensor], costs: Sequence[Tensor], sizes: Sequence[float]) -> Tensor:
    """The order in which the items of all layers go so that layers lose the same share: inside a layer by rate; an item of cost c before
    which b of a layer's cost s has gone comes at the share (b + c/2) / s."""
    orders, shares, offset = [], [], 0
    for rate_S, cost_S, size in zip(rates, costs, sizes, strict=True):
        order_S = torch.sort(rate_S, stable=True).indices
        sorted_S = cost_S[order_S]
        orders.append(offset + order_S)
        shares.append((sorted_S.cumsum(0) - sorted_S / 2) / max(size, torch.finfo(torch.float64).tiny))
        offset += len(rate_S)
    in_turn_S: Tensor = torch.cat(orders)[torch.sort(torch.cat(shares), stable=True).indices]
    return in_turn_S


def _is_reached(budget: Budget, sizes: Mapping[int, float], stays: Sequence[Tensor], costs: Sequence[Tensor], half: float) -> bool:
    """Whether the cost removed is no further below the one asked for than half an item; of layers by themselves, whether the same is so
    of each that has nothing left to remove."""
    removed = [float(cost_S[~stays_S].sum()) for stays_S, cost_S in zip(stays, costs, strict=True)]
    wanted, half = budget.ratio * sum(sizes.values()), half * (1 + ROUNDING_ERROR)
    if budget.scope == "global":
        return wanted - sum(removed) <= half
    free = [0.0 if index in budget.guards.protected_layers else size for index, size in sizes.items()]
    return not any(
        wanted * size / sum(free) - gone > half and not stays_S.any() for size, gone, stays_S in zip(free, removed, stays, strict=True)
    )


def _rates_of_items(scores_EF: Tensor, index: int, widths: Widths, budget: Budget, costs: Costs) -> Tensor:
    """Mean score for cost of each item of a layer, lowest first: infinite where it stays, -inf where there is none."""
    cost_E = costs[index].clamp(min=NEXT_TO_NOTHING * max(float(cost_E.max()) for cost_E in costs.values()))
    rates_EF = _protect(scores_EF / cost_E.unsqueeze(1), index, widths, budget)
    return rates_EF.sort(dim=1).values.view(len(rates_EF), -1, budget.width_multiple).mean(dim=-1)


def _until(wanted: float, order_S: Tensor, cost_S: Tensor) -> Tensor:
    """Mask of the items that stay when they go in an order until the cost removed is nearest to the wanted one."""
    total_S = torch.nn.functional.pad(cost_S[order_S].cumsum(0), (1, 0))
    miss_S = (total_S - wanted).abs()
    number = int((miss_S == miss_S.min()).nonzero()[0])
    stays_S = torch.ones(len(cost_S), dtype=torch.bool)
    stays_S[order_S[:number]] = False
    return stays_S


def _whole_experts(layers: Mapping[int, Tensor], widths: Widths, budget: Budget) -> Plan:
    """A plan that keeps or removes experts as a whole, in number as near to the ratio as they come (of two equally near numbers
    the larger). Layers ("layer") then lose the same share, to within half an expert."""
    kept = {index: scores_EF > -math.inf for index, scores_EF in layers.items()}
    removable = []
    for index, scores_EF in layers.items():
        of_layer = sorted(_removable(scores_EF, index, budget.experts_per_token))
        removable += of_layer if budget.scope == "global" else _at_shares(of_layer, widths[index])
    removable.sort()
    totals = list(accumulate((widths[index][expert] for _, index, expert in removable), initial=0))
    wanted = budget.ratio * sum(sum(width_E) for width_E in widths.values())
    number = min(range(len(totals)), key=lambda number: (abs(totals[number] - wanted), -number))
    for _, index, expert in removable[:number]:
        kept[index][expert] = False
    return Plan(layers=kept)


def _at_shares(removable: Sequence[tuple[float, int, int]], width_E: Sequence[int]) -> list[tuple[float, int, int]]:
    """The same experts of one layer, lowest first, with the share of the layer at which each goes in place of its score: the middle of
    what is gone before and after it."""
    ends = list(accumulate((width_E[expert] for _, _, expert in removable), initial=0))
    shares = [(start + end) / 2 / sum(width_E) for start, end in pairwise(ends)]
    return [(share, index, expert) for share, (_, index, expert) in zip(shares, removable, strict=True)]


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
    best_E = scores_EF.amax(dim=1)
    for expert in _highest(best_E, min(budget.experts_per_token, int((best_E > -math.inf).sum()))):
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
    """How many of each expert are among the first `num_removed` of a layer, where the j-th lowest of an expert of width w comes at the
    share (j - 1/2) / w; of equal shares the lowest score first, and what must stay last."""
    width_E1 = torch.tensor(width_E).unsqueeze(1)
    num_experts, most = scores_EF.shape
    sorted_EF = scores_EF.sort(dim=1, stable=True).values
    rank_EF = torch.arange(most) - (most - width_E1)  # what does not exist sorts first
    share_EF = ((rank_EF + 0.5).double() / width_E1.clamp(min=1)).masked_fill(sorted_EF == math.inf, math.inf)
    exists_EF = rank_EF >= 0
    owner_S = torch.arange(num_experts).unsqueeze(1).expand_as(share_EF)[exists_EF]
    by_score_S = torch.sort(sorted_EF[exists_EF], stable=True).indices
    by_share_S = by_score_S[torch.sort(share_EF[exists_EF][by_score_S], stable=True).indices]
    removed: list[int] = torch.bincount(owner_S[by_share_S[:num_removed]], minlength=num_experts).tolist()
    return removed
