"""Report of an allocation: what was requested, what was removed, and what rounding and protected layers cost.

In: a plan and what it was made from. Out: JSON types, with lines to read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from heapr.pruning.allocation import allocate
from heapr.pruning.budget import Budget, Costs, Widths, cost_of_layer
from heapr.types import Granularity, Plan, Scores

NO_ROUNDING: dict[str, Any] = {"width_multiple": 1, "uniform_width": None, "one_width_per_layer": False}
TOLERANCE = 1e-6  # atomic experts, of floating point


def report_allocation(
    plan: Plan,
    scores: Scores,
    widths: Widths,
    budget: Budget,
    costs: Costs | None = None,
) -> dict[str, Any]:
    """Compare a plan with its budget.

    A rounded plan is compared with the exact one, and a plan with protected layers with the one without them.

    Returns:
        numbers by key; "summary", lines to read; "not_reached", a line for each target that was missed. JSON
        types only.
    """
    without_rounding = replace(budget, **NO_ROUNDING)
    exact = allocate(scores, widths, without_rounding, costs)
    total = _size(widths)
    report: dict[str, Any] = {
        "atomic_experts": total,
        "atomic_experts_removed": total - plan.num_kept,
        "atomic_experts_exchanged": _exchanged(plan, exact),
        "kept_score": _kept_score(plan, scores),
        "kept_score_without_rounding": _kept_score(exact, scores),
    }
    summary = [_about_removal(plan, total, budget.ratio if costs is None else None)]
    if budget.granularity is Granularity.EXPERT:
        summary.append(_about_experts(plan, widths))
    elif _is_rounded(budget):
        summary.append(_about_rounding(plan, exact, budget, report))
    if costs is not None:
        removed_ratio = _cost_removed_ratio(plan, widths, costs)
        report[f"{budget.unit}_removed_ratio"] = removed_ratio
        summary.append(_about_cost(removed_ratio, budget))
    if budget.protected_layers or budget.protected_experts:
        without_protection = replace(budget, protected_layers=(), protected_experts=())
        unprotected = allocate(scores, widths, without_protection, costs)
        report |= _protection(plan, unprotected, scores)
        summary.append(_about_protection(report))
    report["summary"] = summary
    report["not_reached"] = _not_reached(plan, widths, budget)
    return report


def _protection(plan: Plan, unprotected: Plan, scores: Scores) -> dict[str, Any]:
    """What protected layers and experts change, by key."""
    return {
        "atomic_experts_exchanged_by_protection": _exchanged(plan, unprotected),
        "kept_score_without_protection": _kept_score(unprotected, scores),
    }


def _size(widths: Widths) -> int:
    """Number of all atomic experts."""
    return sum(map(sum, widths.values()))


def _is_rounded(budget: Budget) -> bool:
    """Whether widths cannot be what the scores alone would make them."""
    if budget.uniform_width is not None or budget.one_width_per_layer:
        return True
    return budget.width_multiple > 1


def _about_removal(plan: Plan, total: int, ratio: float | None) -> str:
    """How many atomic experts go; with a ratio, also how many it asks for."""
    removed = total - plan.num_kept
    removal = f"removes {removed} of {total} atomic experts"
    if ratio is None:
        return removal
    asked = ratio * total
    return f"{removal} (asked for {asked:.6g})"


def _about_cost(removed_ratio: float, budget: Budget) -> str:
    """Which share of the cost goes, and how much the ratio asks for."""
    share = f"{removed_ratio:.3%} of the routed experts' {budget.unit}"
    return f"these are {share} (asked for {budget.ratio:.3%})"


def _about_experts(plan: Plan, widths: Widths) -> str:
    """How many whole experts go."""
    present = 0
    kept = 0
    for index, width_E in widths.items():
        present += sum(width > 0 for width in width_E)
        kept += _num_experts_kept(plan, index)
    removed = present - kept
    return f"these are {removed} of {present} experts, removed whole"


def _num_experts_kept(plan: Plan, index: int) -> int:
    """Experts of a layer that keep at least one atomic expert."""
    is_kept_E = plan.layers[index].any(dim=1)
    return int(is_kept_E.sum())


def _about_rounding(plan: Plan, exact: Plan, budget: Budget, report: Mapping[str, Any]) -> str:
    """What rounding exchanges, and the score that it costs."""
    form = f"multiples of {budget.width_multiple}"
    if budget.uniform_width is not None:
        form = f"one width of {budget.uniform_width}"
    elif budget.one_width_per_layer:
        widths = [str(max(width_E)) for width_E in plan.widths.values()]
        listed = ", ".join(widths)
        form = f"one width per layer ({listed})"
    exchanged = report["atomic_experts_exchanged"]
    scores = _about_scores(report["kept_score_without_rounding"], report["kept_score"])
    return (
        f"rounding to {form}: {exact.num_kept} -> {plan.num_kept} kept, "
        f"{exchanged} of which would be removed without rounding; {scores}"
    )


def _about_protection(report: Mapping[str, Any]) -> str:
    """What protected layers and experts keep, and the score that it costs."""
    exchanged = report["atomic_experts_exchanged_by_protection"]
    scores = _about_scores(report["kept_score_without_protection"], report["kept_score"])
    return f"protection keeps {exchanged} atomic experts that would otherwise be removed; {scores}"


def _about_scores(before: float, after: float) -> str:
    return f"sum of kept scores {before:.6g} -> {after:.6g}"


def _not_reached(plan: Plan, widths: Widths, budget: Budget) -> list[str]:
    """A line for each target that was missed by more than rounding explains, because too much must stay.

    Costs are either reached or refused, and a uniform width or a number of experts is reported when it is
    chosen, so none of them appears here.
    """
    is_chosen = budget.uniform_width is not None or budget.num_experts is not None
    if budget.unit != "atomic_experts" or is_chosen:
        return []
    total = _size(widths)
    asked = budget.ratio * total
    removed = total - plan.num_kept
    within = len(widths) * budget.width_multiple / 2
    if budget.granularity is Granularity.EXPERT:
        widest = max(map(max, widths.values()))
        within = widest / 2
    lines = []
    if abs(removed - asked) > within + TOLERANCE:
        lines.append(_missed(asked, removed, budget))
    if budget.granularity is Granularity.EXPERT and budget.scope == "layer":
        lines += _layers_not_reached(plan, widths, budget)
    return lines


def _layers_not_reached(plan: Plan, widths: Widths, budget: Budget) -> list[str]:
    """The same for each layer that has no more experts to remove."""
    lines = []
    for index, width_E in widths.items():
        size = sum(width_E)
        asked = budget.ratio * size
        removed = size - int(plan.layers[index].sum())
        is_exhausted = _num_experts_kept(plan, index) <= budget.experts_per_token
        within = max(width_E) / 2
        if is_exhausted and asked - removed > within + TOLERANCE:
            missed = _missed(asked, removed, budget)
            lines.append(f"layer {index}: {missed}; other layers lose more where they can")
    return lines


def _missed(asked: float, removed: int, budget: Budget) -> str:
    """A target that was missed, and why."""
    stay = "stay whole"
    removes_atomic_experts = budget.granularity is Granularity.ATOMIC_EXPERT
    if removes_atomic_experts:
        stay = f"keep a width of at least {budget.width_multiple}"
    routing = f"every token is routed to {budget.experts_per_token} experts"
    reason = f"because {routing} and as many of each layer {stay}"
    return f"{removed} atomic experts are removed instead of {asked:.6g}: the rest must stay, {reason}"


def _cost_removed_ratio(plan: Plan, widths: Widths, costs: Costs) -> float:
    """Share of the cost of all atomic experts that the plan removes."""
    before = 0.0
    after = 0.0
    widths_left = plan.widths
    for index, cost_E in costs.items():
        before += cost_of_layer(cost_E, widths[index])
        after += cost_of_layer(cost_E, widths_left[index])
    return 1 - after / before


def _exchanged(plan: Plan, other: Plan) -> int:
    """Atomic experts that `plan` keeps and `other` does not."""
    total = 0
    for index, kept_EF in plan.layers.items():
        only_here_EF = kept_EF & ~other.layers[index]
        total += int(only_here_EF.sum())
    return total


def _kept_score(plan: Plan, scores: Scores) -> float:
    """Sum of the scores that a plan keeps."""
    total = 0.0
    for index, kept_EF in plan.layers.items():
        kept_score_S = scores.layers[index][kept_EF].double()
        total += float(kept_score_S.sum())
    return total
