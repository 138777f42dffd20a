"""Whether a baseline's own increase is more than chance: a share of what is near zero means nothing.

In: jobs with shares (heapr.report.sweep.relative). Out: a verdict for each share, and the words that explain
its mark.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from heapr.report.sweep import metrics
from heapr.report.sweep.results import JobResult

MARK = "†"
STANDARD_ERRORS = 3  # an increase of fewer of its standard errors is marked
# KL is zero for equal models and positive for all others: no test.
TESTED = {
    "perplexity",
    "accuracy",
    "accuracy_norm",
}
SHARE = "relative"  # before a metric's name
INCREASE, ERROR = "baseline_increase", "baseline_increase_standard_error"  # between the two


def evidence(baseline: JobResult, name: str) -> dict[str, float]:
    """A baseline's increase of a metric over the dense model and the standard error of that, as far as they
    were measured."""
    found = {INCREASE: metrics.increase(baseline, name), ERROR: increase_error(baseline, name)}
    return {f"{kind}/{name}": number for kind, number in found.items() if number is not None}


def increase_error(job: JobResult, name: str) -> float | None:
    """Of a perplexity as its windows, paired, tell it. Of an accuracy as if both models' questions were
    different ones, which is rather too large. None of what is not tested or was not measured."""
    kind, _, rest = name.partition("/")
    if kind == "perplexity":
        return metrics.value(job, f"perplexity_increase_standard_error/{rest}")
    errors = [metrics.standard_error(job, name, dense=dense) for dense in (False, True)]
    known = [error for error in errors if error is not None]
    return math.hypot(*known) if len(known) == len(errors) else None


def is_doubtful(jobs: Sequence[JobResult], column: str) -> bool | None:
    """Whether the mean increase of the jobs' baselines is below three of its standard errors. That is the
    mean of theirs: jobs that differ in their seed are measured on the same windows, so what one text leaves
    uncertain does not shrink with their number.

    Args:
        jobs: that are averaged in one cell or point.
        column: a share's name.

    Returns:
        None if a standard error is not known, or the metric is not tested.
    """
    name = column.removeprefix(f"{SHARE}/")
    if column == name or name.partition("/")[0] not in TESTED:
        return None
    increases = [metrics.value(job, f"{SHARE}/{INCREASE}/{name}") for job in jobs]
    errors = [metrics.value(job, f"{SHARE}/{ERROR}/{name}") for job in jobs]
    known = [
        (number, error)
        for number, error in zip(increases, errors, strict=True)
        if number is not None and error is not None
    ]
    if not known or len(known) < sum(number is not None for number in increases):
        return None
    mean_increase = sum(number for number, _ in known) / len(known)
    mean_error = sum(error for _, error in known) / len(known)
    return mean_increase < STANDARD_ERRORS * mean_error


def explanation(groups: Iterable[Sequence[JobResult]], columns: Sequence[str], mark: str = MARK) -> str:
    """What the mark means, if there is one, and which shares could not be tested; empty where neither is of
    interest.

    Args:
        groups: jobs of each row or point.
        columns: names of shares and other metrics.
        mark: what doubtful shares are marked with.
    """
    tested = [
        column for column in columns if column.startswith(f"{SHARE}/") and column.split("/")[1] in TESTED
    ]
    shown = [
        (group, column)
        for group in groups
        for column in tested
        if any(metrics.value(job, column) is not None for job in group)
    ]
    verdicts = [(group, is_doubtful(group, column)) for group, column in shown]
    parts = []
    if any(verdict for _, verdict in verdicts):
        parts.append(
            f"{mark}: the baseline's increase is below three of its standard errors, so the share means"
            " nothing."
        )
    untested = sorted({job.number for group, verdict in verdicts if verdict is None for job in group})
    if untested and all(verdict is None for _, verdict in verdicts):
        parts.append("Not tested: these results do not hold standard errors of the baseline's increase.")
    elif untested:
        numbers = ", ".join(map(str, untested))
        parts.append(
            f"Not tested, for want of the standard error of the baseline's increase: jobs {numbers}."
        )
    return " ".join(parts)
