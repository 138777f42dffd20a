"""Allocation: from scores to a plan. How many atomic or whole experts go, and where; nothing about models.

In: scores, the widths of the experts they belong to, and a budget. Out: a `Plan`.
Shape letters: E experts, F atomic experts of the widest expert, K experts per token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from heapr.errors import ConfigError
from heapr.types import Granularity, Plan, Scores

Widths = Mapping[int, Sequence[int]]  # atomic experts of every expert, by decoder layer index


@dataclass(frozen=True)
class Budget:
    """How much is removed.

    Attributes:
        ratio: share of all routed atomic experts to remove, in [0, 1).
        scope: what is ranked together: "global" all layers (HEAPr-G of the paper), "layer" each layer by itself (HEAPr-L),
            "expert" each expert by itself. Layers ("layer", "expert") and experts ("expert") lose the same share, up to one
            atomic expert, so that the total is exact.
        experts_per_token: K; at least so many experts of every layer keep at least one atomic expert.
        width_multiple: every expert's width becomes a multiple of it.
        is_uniform: every expert of every layer gets the same width (scope "expert").
        granularity: whole experts (not with scope "expert") are removed as near to the ratio as they come; layers ("layer") then
            lose the same share up to one expert, and K experts of every layer stay whole.
    """

    ratio: float
    scope: str
    experts_per_token: int
    width_multiple: int = 1
    is_uniform: bool = False
    granularity: Granularity = Granularity.ATOMIC_EXPERT

    def __post_init__(self) -> None:
        assert 0 <= self.ratio < 1 and self.scope in {"global", "layer", "expert"}, (self.ratio, self.scope)
        assert not self.is_uniform or self.scope == "expert"
        assert self.granularity is Granularity.ATOMIC_EXPERT or self.scope != "expert"

    def of_round(self, ratio: float, widths: Widths, total: int) -> Budget:
        """The budget for what an earlier round left, after which `ratio` of `total` atomic experts is gone."""
        left = sum(sum(width_E) for width_E in widths.values())
        return replace(self, ratio=ratio if left == total else 1 - (total - round_half_up(ratio * total)) / left)

    def check(self, widths: Widths) -> None:
        """Whatever can be refused before there are scores.

        Raises:
            ConfigError: a layer would keep fewer experts than a token needs, or widths are no multiples.
        """
        if self.granularity is Granularity.EXPERT:
            self._check_whole_experts(widths)
        self.numbers_removed([sum(width_E) for width_E in widths.values()])
        several = {width for width_E in widths.values() for width in width_E if width % self.width_multiple}
        if several:
            raise ConfigError(
                f"pruning.width_multiple={self.width_multiple}, but experts of this model have {min(several)} atomic experts, "
                f"which is no multiple of it; choose a divisor, for example {math.gcd(self.width_multiple, *several)}"
            )
        if self.is_uniform:
            self.uniform_width(widths)

    def numbers_removed(self, sizes: Sequence[int]) -> list[int]:
        """How many atomic experts go: one number for all layers ("global"), else one per layer.

        Args:
            sizes: atomic experts of each layer.

        Raises:
            ConfigError: a layer would keep fewer experts than a token needs.
        """
        before = [0] + [round_half_up(self.ratio * end) for end in accumulate(sizes)]
        if self.scope == "global":
            numbers, most = before[-1:], [sum(sizes) - self.experts_per_token * len(sizes)]
        else:  # boundaries are rounded, not shares, so that the total is exact
            numbers, most = [end - start for start, end in pairwise(before)], [size - self.experts_per_token for size in sizes]
        if any(number > limit for number, limit in zip(numbers, most, strict=True)):
            raise self._too_few_experts()
        return numbers

    def _check_whole_experts(self, widths: Widths) -> None:
        """At the least, the K narrowest experts of each layer stay."""
        sizes = [sum(width_E) for width_E in widths.values()]
        stay = [sum(sorted(filter(None, width_E))[: self.experts_per_token]) for width_E in widths.values()]
        if self.scope == "global":
            sizes, stay = [sum(sizes)], [sum(stay)]
        if any(round_half_up(self.ratio * size) > size - least for size, least in zip(sizes, stay, strict=True)):
            raise self._too_few_experts()

    def _too_few_experts(self) -> ConfigError:
        return ConfigError(
            f"pruning.ratio={self.ratio} with scope '{self.scope}' would leave a layer fewer experts than the "
            f"{self.experts_per_token} that every token is routed to; choose a lower ratio"
        )

    def uniform_width(self, widths: Widths) -> int:
        """The one width that is nearest to what the ratio asks for, at least one multiple.

        Raises:
            ConfigError: the experts do not have one width now.
        """
        present = {width for width_E in widths.values() for width in width_E}
        if len(present) != 1:
            raise ConfigError(f"pruning.form=uniform needs experts of one width, this model has {len(present)}; use pruning.form=ragged")
        multiples = round_half_up(present.pop() * (1 - self.ratio) / self.width_multiple)
        return max(1, multiples) * self.width_multiple


def allocate(scores: Scores, widths: Widths, budget: Budget) -> Plan:
    """Remove the lowest-scoring atomic experts, or the lowest-scoring whole experts.

    Equal scores are removed in order of layer, expert and atomic expert. The best atomic expert of each layer's K best
    experts always stays; of whole experts, each layer's K best.

    Args:
        scores: bigger is more important. What lies beyond an expert's width is ignored.
        widths: of the scored experts.
        budget: how much.

    Raises:
        ConfigError: see `Budget.check`.
    """
    layers = {index: scores_EF.masked_fill(~_exists(scores_EF, widths[index]), -math.inf) for index, scores_EF in scores.layers.items()}
    if budget.granularity is Granularity.EXPERT:
        return _whole_experts(layers, widths, budget)
    if budget.is_uniform:
        width = budget.uniform_width(widths)
        return Plan(layers={index: _keep_best_of_each(scores_EF, [width] * len(scores_EF)) for index, scores_EF in layers.items()})
    exact = _exact(layers, widths, budget)
    return exact if budget.width_multiple == 1 else _round_widths(exact, layers, budget)


def report_allocation(plan: Plan, scores: Scores, widths: Widths, budget: Budget) -> dict[str, Any]:
    """What was asked for and what was done; rounding compared with the exact plan. JSON types only."""
    total = sum(sum(width_E) for width_E in widths.values())
    exact = allocate(scores, widths, replace(budget, width_multiple=1, is_uniform=False))
    removed, exchanged = total - plan.num_kept, sum(int((plan.layers[i] & ~exact.layers[i]).sum()) for i in plan.layers)
    kept_score, exact_score = _kept_score(plan, scores), _kept_score(exact, scores)
    summary = [f"removes {removed} of {total} atomic experts (asked for {budget.ratio * total:.6g})"]
    if budget.granularity is Granularity.EXPERT:
        present = sum(width > 0 for width_E in widths.values() for width in width_E)
        kept = sum(int(kept_EF.any(dim=1).sum()) for kept_EF in plan.layers.values())
        summary.append(f"these are {present - kept} of {present} experts, removed whole")
    elif budget.width_multiple > 1 or budget.is_uniform:
        form = "one width" if budget.is_uniform else f"multiples of {budget.width_multiple}"
        summary.append(
            f"rounding to {form}: {exact.num_kept} -> {plan.num_kept} kept, {exchanged} of them others than without; "
            f"sum of kept scores {exact_score:.6g} -> {kept_score:.6g}"
        )
    return {
        "atomic_experts": total,
        "atomic_experts_removed": removed,
        "atomic_experts_exchanged": exchanged,
        "kept_score": kept_score,
        "kept_score_without_rounding": exact_score,
        "summary": summary,
    }


def _kept_score(plan: Plan, scores: Scores) -> float:
    return sum(float(scores.layers[index][kept_EF].double().sum()) for index, kept_EF in plan.layers.items())


def _exact(layers: Mapping[int, Tensor], widths: Widths, budget: Budget) -> Plan:
    """A plan that removes exactly round(ratio * number of atomic experts), whatever the scope."""
    exists = {index: scores_EF > -math.inf for index, scores_EF in layers.items()}
    protected = {index: _protect(scores_EF, budget.experts_per_token) for index, scores_EF in layers.items()}
    numbers = budget.numbers_removed([sum(widths[index]) for index in layers])
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
        sorted_EF = scored[index].sort(dim=1, descending=True, stable=True).values.double()
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


def round_half_up(number: float) -> int:
    return math.floor(number + 0.5)


def _exists(scores_EF: Tensor, width_E: Sequence[int]) -> Tensor:
    """Mask (E, F) of the atomic experts that there are."""
    return torch.arange(scores_EF.shape[1]) < torch.tensor(width_E).unsqueeze(1)


def _protect(scores_EF: Tensor, experts_per_token: int) -> Tensor:
    """Scores with the best atomic expert (the first of equals) of the K best experts raised to infinity."""
    protected_EF = scores_EF.clone()
    for expert in _highest(scores_EF.amax(dim=1), experts_per_token):
        protected_EF[expert, scores_EF[expert].argmax()] = math.inf
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
            sorted_F[first + base] if base < width else torch.tensor(math.inf)
            for sorted_F, first, base, width in zip(sorted_EF, first_E, base_E, width_E, strict=True)
        ]
    )
    for expert in torch.sort(next_E, stable=True).indices[: num_removed - sum(base_E)].tolist():
        base_E[expert] += 1
    return base_E
