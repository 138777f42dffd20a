"""Whether a baseline's own increase is more than chance: a share of an increase near zero means nothing.

In: jobs with shares (heapr.report.sweep.relative). Out: a verdict for each share, and a sentence that
explains its mark.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from heapr.report.sweep import metrics
from heapr.report.sweep.results import JobResult, Jobs

MARK = "†"
STANDARD_ERRORS = 3  # a smaller increase is doubtful
# KL is not tested: it is zero for equal models and positive for all others.
TESTED = {"perplexity", "accuracy", "accuracy_norm"}
SHARE = "relative"  # before a metric's name
INCREASE, ERROR = "baseline_increase", "baseline_increase_standard_error"  # between the two


def evidence(baseline: JobResult, name: str) -> dict[str, float]:
    """Return a baseline's increase of a metric over the dense model, and its standard error, if measured."""
    found = {INCREASE: metrics.increase(baseline, name), ERROR: increase_error(baseline, name)}
    return {f"{kind}/{name}": number for kind, number in found.items() if number is not None}


def increase_error(job: JobResult, name: str) -> float | None:
    """Return the standard error of a metric's increase over the dense model.

    For a perplexity it comes from paired windows. For an accuracy it is sqrt(e_pruned² + e_dense²), which
    treats the two models' answers as independent and is rather too large. None for metrics that are not
    tested or were not measured.
    """
    kind, _, rest = name.partition("/")
    if kind == "perplexity":
        return metrics.value(job, f"perplexity_increase_standard_error/{rest}")
    errors = [metrics.standard_error(job, name, dense=dense) for dense in (False, True)]
    known = [error for error in errors if error is not None]
    return math.hypot(*known) if len(known) == len(errors) else None


def is_doubtful(jobs: Jobs, column: str) -> bool | None:
    """Return whether the mean increase of the jobs' baselines is below three standard errors.

    The standard error of the mean is taken as the mean of the standard errors: jobs with different seeds are
    measured on the same windows, so the uncertainty of a text does not shrink with their number.

    Args:
        jobs: that are averaged in one cell or point.
        column: a share's name.

    Returns:
        None if a standard error is not known, or the metric is not tested.
    """
    name = column.removeprefix(f"{SHARE}/")
    if column == name or name.partition("/")[0] not in TESTED:
        return None
    increases, errors = [], []
    for job in jobs:
        increase = metrics.value(job, f"{SHARE}/{INCREASE}/{name}")
        error = metrics.value(job, f"{SHARE}/{ERROR}/{name}")
        if increase is None:
            continue
        if error is None:
            return None
        increases.append(increase)
        errors.append(error)
    if not increases:
        return None
    mean_increase = sum(increases) / len(increases)
    mean_error = sum(errors) / len(errors)
    return mean_increase < STANDARD_ERRORS * mean_error


def explanation(groups: Iterable[Jobs], columns: Sequence[str], mark: str = MARK) -> str:
    """Say what the mark means if a share has it, and which shares could not be tested.

    Args:
        groups: jobs of each row or point.
        columns: names of shares and other metrics.
        mark: of doubtful shares.

    Returns:
        The sentences; empty if no share is doubtful and all could be tested.
    """
    tested = [name for name in columns if name.startswith(f"{SHARE}/") and name.split("/")[1] in TESTED]
    verdicts = []
    untested: set[int] = set()
    for group in groups:
        for column in tested:
            if all(metrics.value(job, column) is None for job in group):
                continue
            verdict = is_doubtful(group, column)
            verdicts.append(verdict)
            if verdict is None:
                untested |= {job.number for job in group}
    parts = []
    if any(verdicts):
        parts.append(
            f"{mark}: the baseline's increase is below three of its standard errors, so the share means"
            " nothing."
        )
    if untested and all(verdict is None for verdict in verdicts):
        parts.append("Not tested: these results do not hold standard errors of the baseline's increase.")
    elif untested:
        numbers = ", ".join(map(str, sorted(untested)))
        parts.append(
            f"Not tested, because the standard error of the baseline's increase is missing: jobs {numbers}."
        )
    return " ".join(parts)
