"""The points of a sweep's curves as numbers, for trackers: quality over the share asked to be removed.

In: jobs. Out: a row for each ratio, from the unpruned model's on.
"""

from __future__ import annotations

from collections.abc import Sequence

from heapr.report.sweep import metrics
from heapr.report.sweep.factors import METHOD, factor
from heapr.report.sweep.report_layout import Entry
from heapr.report.sweep.results import Jobs
from heapr.report.sweep.series import Series, by_model, series_of


def ratio_points(jobs: Jobs) -> dict[float, dict[str, float]]:
    """Return numbers by name for each ratio, in order; empty unless the jobs have several ratios.

    A name is `<metric>/<method>`, with the model's name before the method if there are several models.
    Numbers are means over seeds. Metrics are those that the dense model has too, or has by definition, as
    the divergence from itself.
    """
    ratios = {factor(job, "ratio") for job in jobs if job.summary is not None}
    if len(ratios) < 2:
        return {}
    names = [name for name in metrics.known(jobs) if name.partition("/")[0] in metrics.COMPARED]
    entry = Entry(kind="ratio_curve", title="", series=(METHOD,), average_over="seed")
    found: dict[float, dict[str, float]] = {}
    for model, of_model in by_model(jobs):
        for series in series_of(of_model, entry, x="ratio"):
            label = f"{model} {series.label}".strip()
            for metric in names:
                _add(found, f"{metric}/{label}", series, metric)
    return dict(sorted(found.items()))


def _add(found: dict[float, dict[str, float]], name: str, series: Series, metric: str) -> None:
    """Add the points of a line: that of the unpruned model at zero, then the others."""
    first_job = series.points[0][0]
    dense = metrics.dense_value(first_job, metric)
    if dense is not None:
        found.setdefault(0.0, {})[name] = dense
    for jobs in series.points:
        values = [metrics.value(job, metric) for job in jobs]
        mean = _mean([value for value in values if value is not None])
        if mean is not None:
            ratio = float(factor(jobs[0], "ratio"))
            found.setdefault(ratio, {})[name] = mean


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
