"""What an allocation did, beside what was asked for and what it would do without rounding and protected
layers.

In: a plan and what it was made from. Out: JSON types, and lines to read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from heapr.pruning.allocation import allocate
from heapr.pruning.budget import Budget, Costs, Widths, cost_of_layer
from heapr.types import Granularity, Plan, Scores

TOLERANCE = 1e-6  # atomic experts, of floating point


def report_allocation(
    plan: Plan,
    scores: Scores,
    widths: Widths,
    budget: Budget,
    costs: Costs | None = None,
) -> dict[str, Any]:
    """What was asked for and what was done; a rounded plan compared with the exact one, and one with
    protected layers with the one without. JSON types only."""
    exact = allocate(scores, widths, replace(budget, width_multiple=1, uniform_width=None), costs)
    total = sum(sum(width_E) for width_E in widths.values())
    removed = total - plan.num_kept
    report: dict[str, Any] = {
        "atomic_experts": total,
        "atomic_experts_removed": removed,
        "atomic_experts_exchanged": _exchanged(plan, exact),
        "kept_score": _kept_score(plan, scores),
        "kept_score_without_rounding": _kept_score(exact, scores),
    }
    summary = [f"removes {removed} of {total} atomic experts"]
    if costs is None:
        summary[0] += f" (asked for {budget.ratio * total:.6g})"
    if budget.granularity is Granularity.EXPERT:
        summary.append(_about_experts(plan, widths))
    elif budget.width_multiple > 1 or budget.uniform_width is not None:
        summary.append(_about_rounding(plan, exact, budget, report))
    if costs is not None:
        removed_ratio = _cost_removed_ratio(plan, widths, costs)
        report[f"{budget.unit}_removed_ratio"] = removed_ratio
        asked = f"asked for {budget.ratio:.3%}"
        summary.append(f"these are {removed_ratio:.3%} of the routed experts' {budget.unit} ({asked})")
    if budget.protected_layers:
        without = allocate(scores, widths, replace(budget, protected_layers=()), costs)
        exchanged = _exchanged(plan, without)
        score = _kept_score(without, scores)
        report["atomic_experts_exchanged_by_protection"] = exchanged
        report["kept_score_without_protection"] = score
        summary.append(
            f"protected layers keep {exchanged} atomic experts that would go otherwise; "
            f"sum of kept scores {score:.6g} -> {report['kept_score']:.6g}"
        )
    return report | {"summary": summary, "not_reached": _not_reached(plan, widths, budget)}


def _about_experts(plan: Plan, widths: Widths) -> str:
    present = sum(width > 0 for width_E in widths.values() for width in width_E)
    kept = sum(int(kept_EF.any(dim=1).sum()) for kept_EF in plan.layers.values())
    return f"these are {present - kept} of {present} experts, removed whole"


def _about_rounding(plan: Plan, exact: Plan, budget: Budget, report: Mapping[str, Any]) -> str:
    form = f"multiples of {budget.width_multiple}"
    if budget.uniform_width is not None:
        form = f"one width of {budget.uniform_width}"
    exchanged = report["atomic_experts_exchanged"]
    scores = f"{report['kept_score_without_rounding']:.6g} -> {report['kept_score']:.6g}"
    return (
        f"rounding to {form}: {exact.num_kept} -> {plan.num_kept} kept, "
        f"{exchanged} of them others than without; sum of kept scores {scores}"
    )


def _not_reached(plan: Plan, widths: Widths, budget: Budget) -> list[str]:
    """A line for each number that is further from what was asked for than rounding explains: what must stay
    was in the way.

    A cost that is asked for is reached or refused, and what a uniform width comes to is reported when it is
    chosen.
    """
    if budget.unit != "atomic_experts" or budget.uniform_width is not None:
        return []
    sizes = {index: sum(width_E) for index, width_E in widths.items()}
    removed = {index: sizes[index] - int(kept_EF.sum()) for index, kept_EF in plan.layers.items()}
    is_whole = budget.granularity is Granularity.EXPERT
    widest = max(max(width_E) for width_E in widths.values())
    within = widest / 2 if is_whole else len(sizes) * budget.width_multiple / 2
    asked = budget.ratio * sum(sizes.values())
    going = sum(removed.values())
    must_stay = f"the rest must stay, {_why(budget)}"
    lines = []
    if abs(going - asked) > within + TOLERANCE:
        lines.append(f"{asked:.6g} atomic experts were to go and {going} do: {must_stay}")
    if not (is_whole and budget.scope == "layer"):
        return lines
    for index, size in sizes.items():
        asked = budget.ratio * size
        num_experts_left = int(plan.layers[index].any(dim=1).sum())
        missing = asked - removed[index]
        if num_experts_left <= budget.experts_per_token and missing > max(widths[index]) / 2 + TOLERANCE:
            lines.append(
                f"layer {index}: {asked:.6g} atomic experts were to go and {removed[index]} do: {must_stay}; "
                "other layers lose more where they can"
            )
    return lines


def _why(budget: Budget) -> str:
    stay = "stay whole"
    if budget.granularity is Granularity.ATOMIC_EXPERT:
        stay = f"keep a width of at least {budget.width_multiple}"
    num_experts = budget.experts_per_token
    return f"because every token is routed to {num_experts} experts, so that many of each layer {stay}"


def _cost_removed_ratio(plan: Plan, widths: Widths, costs: Costs) -> float:
    before = sum(cost_of_layer(cost_E, widths[index]) for index, cost_E in costs.items())
    after = sum(cost_of_layer(cost_E, plan.widths[index]) for index, cost_E in costs.items())
    return 1 - after / before


def _exchanged(plan: Plan, other: Plan) -> int:
    """Atomic experts that a plan keeps and the other does not."""
    total = 0
    for index, kept_EF in plan.layers.items():
        only_here_EF = kept_EF & ~other.layers[index]
        total += int(only_here_EF.sum())
    return total


def _kept_score(plan: Plan, scores: Scores) -> float:
    total = 0.0
    for index, kept_EF in plan.layers.items():
        kept_score_S = scores.layers[index][kept_EF].double()
        total += float(kept_score_S.sum())
    return total
