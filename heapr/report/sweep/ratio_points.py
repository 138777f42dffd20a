"""The points of a sweep's curves as numbers, for trackers: quality over the share asked to be removed.

In: jobs. Out: a row for each ratio, from the unpruned model's on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from heapr.report.sweep import metrics
from heapr.report.sweep.factors import METHOD, factor
from heapr.report.sweep.report_layout import Entry
from heapr.report.sweep.results import Jobs
from heapr.report.sweep.series import Series, by_model, series_of

Points = dict[float, dict[str, float]]  # numbers by name, by ratio


def ratio_points(jobs: Jobs) -> Points:
    """Return numbers by name for each ratio, in order; empty unless the jobs have several ratios.

    A name is `<metric>/<method>`, with the model's name before the method if there are several models.
    Numbers are means over seeds. Metrics are those that the dense model has too, or has by definition, as
    the divergence from itself.
    """
    ratios = {factor(job, "ratio") for job in jobs if job.summary is not None}
    if len(ratios) < 2:
        return {}
    entry = Entry(kind="ratio_curve", title="", series=(METHOD,), average_over="seed")
    names = _compared(jobs)
    found: Points = {}
    for model, of_model in by_model(jobs):
        for series in series_of(of_model, entry, x="ratio"):
            label = f"{model} {series.label}".strip()
            for metric in names:
                _add(found, f"{metric}/{label}", _line(series, metric))
    return dict(sorted(found.items()))


def _add(found: Points, name: str, line: Iterable[tuple[float, float]]) -> None:
    for ratio, number in line:
        numbers = found.setdefault(ratio, {})
        numbers[name] = number


def _compared(jobs: Jobs) -> list[str]:
    """Return the metrics in which pruned models are compared to the dense one."""
    names = []
    for name in metrics.known(jobs):
        kind, _, _ = name.partition("/")
        if kind in metrics.COMPARED:
            names.append(name)
    return names


def _line(series: Series, metric: str) -> Iterator[tuple[float, float]]:
    """Yield ratio and number of each point: the unpruned model's at zero, then means over seeds."""
    dense = metrics.dense_value(series.first_job, metric)
    if dense is not None:
        yield 0.0, dense
    for jobs in series.points:
        measured = [metrics.value(job, metric) for job in jobs]
        values = [value for value in measured if value is not None]
        if values:
            ratio = float(factor(jobs[0], "ratio"))
            yield ratio, sum(values) / len(values)
