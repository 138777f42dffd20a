"""What an allocation did, beside what was asked for and what it would have done without rounding and without guards.

In: a plan and what it was made from. Out: JSON types, and lines to read.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from heapr.pruning.allocation import allocate
from heapr.pruning.budget import Budget, Costs, Guards, Widths
from heapr.types import Granularity, Plan, Scores

TOLERANCE = 1e-6  # atomic experts, of floating point


def report_allocation(plan: Plan, scores: Scores, widths: Widths, budget: Budget, costs: Costs | None = None) -> dict[str, Any]:
    """What was asked for and what was done; rounding compared with the exact plan, guards with the plan without. JSON types only."""
    total = sum(sum(width_E) for width_E in widths.values())
    exact = allocate(scores, widths, replace(budget, width_multiple=1, uniform_width=None), costs)
    removed, exchanged = total - plan.num_kept, _exchanged(plan, exact)
    kept_score, exact_score = _kept_score(plan, scores), _kept_score(exact, scores)
    asked = f" (asked for {budget.ratio * total:.6g})" if costs is None else ""
    summary = [f"removes {removed} of {total} atomic experts{asked}"]
    if budget.granularity is Granularity.EXPERT:
        present = sum(width > 0 for width_E in widths.values() for width in width_E)
        kept = sum(int(kept_EF.any(dim=1).sum()) for kept_EF in plan.layers.values())
        summary.append(f"these are {present - kept} of {present} experts, removed whole")
    elif budget.width_multiple > 1 or budget.uniform_width is not None:
        form = f"one width of {budget.uniform_width}" if budget.uniform_width is not None else f"multiples of {budget.width_multiple}"
        summary.append(
            f"rounding to {form}: {exact.num_kept} -> {plan.num_kept} kept, {exchanged} of them others than without; "
            f"sum of kept scores {exact_score:.6g} -> {kept_score:.6g}"
        )
    report: dict[str, Any] = {
        "atomic_experts": total,
        "atomic_experts_removed": removed,
        "atomic_experts_exchanged": exchanged,
        "kept_score": kept_score,
        "kept_score_without_rounding": exact_score,
    }
    if costs is not None:
        ratio = report[f"{budget.unit}_removed_ratio"] = _cost_removed_ratio(plan, widths, costs)
        summary.append(f"these are {ratio:.3%} of the routed experts' {budget.unit} (asked for {budget.ratio:.3%})")
    if not budget.guards.are_off:
        unguarded = allocate(scores, widths, replace(budget, guards=Guards()), costs)
        exchanged = report["atomic_experts_exchanged_by_guards"] = _exchanged(plan, unguarded)
        unguarded_score = report["kept_score_without_guards"] = _kept_score(unguarded, scores)
        summary.append(
            f"guards keep {exchanged} atomic experts that would go without; sum of kept scores {unguarded_score:.6g} -> {kept_score:.6g}"
        )
    return report | {"summary": summary, "not_reached": _not_reached(plan, widths, budget)}


def _not_reached(plan: Plan, widths: Widths, budget: Budget) -> list[str]:
    """A line for each number that is further from what was asked for than rounding explains: what must stay was in the way. What costs are
    asked for is reached or refused, and what a uniform width comes to is told when it is chosen."""
    if budget.unit != "atomic_experts" or budget.uniform_width is not None:
        return []
    sizes = {index: sum(width_E) for index, width_E in widths.items()}
    removed = {index: sizes[index] - int(kept_EF.sum()) for index, kept_EF in plan.layers.items()}
    is_whole = budget.granularity is Granularity.EXPERT
    widest = max(width for width_E in widths.values() for width in width_E)
    within = widest / 2 if is_whole else len(sizes) * budget.width_multiple / 2
    asked = budget.ratio * sum(sizes.values())
    lines = []
    if abs(sum(removed.values()) - asked) > within + TOLERANCE:
        lines.append(f"{asked:.6g} atomic experts were to go and {sum(removed.values())} do: the rest must stay, {_why(budget)}")
    for index, size in sizes.items() if is_whole and budget.scope == "layer" else ():
        has_no_more = int(plan.layers[index].any(dim=1).sum()) <= budget.experts_per_token
        if has_no_more and budget.ratio * size - removed[index] > max(widths[index]) / 2 + TOLERANCE:
            lines.append(
                f"layer {index}: {budget.ratio * size:.6g} atomic experts were to go and {removed[index]} do: the rest must stay, "
                f"{_why(budget)}; other layers lose more where they can"
            )
    return lines


def _why(budget: Budget) -> str:
    whole = "stay whole" if budget.granularity is Granularity.EXPERT else f"keep a width of at least {budget.width_multiple}"
    return f"because every token is routed to {budget.experts_per_token} experts, so that many of each layer {whole}"


def _cost_removed_ratio(plan: Plan, widths: Widths, costs: Costs) -> float:
    before = sum(float((cost_E * torch.tensor(widths[index])).sum()) for index, cost_E in costs.items())
    after = sum(float((cost_E * plan.layers[index].sum(dim=1)).sum()) for index, cost_E in costs.items())
    return 1 - after / before


def _exchanged(plan: Plan, other: Plan) -> int:
    """Atomic experts that a plan keeps and the other does not."""
    return sum(int((kept_EF & ~other.layers[index]).sum()) for index, kept_EF in plan.layers.items())


def _kept_score(plan: Plan, scores: Scores) -> float:
    return sum(float(scores.layers[index][kept_EF].double().sum()) for index, kept_EF in plan.layers.items())
