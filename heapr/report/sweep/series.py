"""The lines of a figure: which jobs belong to each, which are averaged in each of its points.

In: an entry of the layout and its jobs. Out: series and their points.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from heapr.report.sweep import metrics
from heapr.report.sweep.averages import grouped
from heapr.report.sweep.factors import describe, factor, in_order, telling_apart, varying
from heapr.report.sweep.report_layout import Entry
from heapr.report.sweep.results import JobResult, Jobs, finished


@dataclass(frozen=True)
class Point:
    """One point of a line: its number, and mean and sample standard deviation (0 for one job) of its jobs."""

    number: int
    mean: float
    deviation: float


@dataclass(frozen=True)
class Series:
    """One line of a figure.

    Attributes:
        label: in the legend.
        points: one tuple per point, with the jobs that are averaged there.
    """

    label: str
    points: tuple[tuple[JobResult, ...], ...]

    @property
    def first_job(self) -> JobResult:
        """A job of the first point."""
        return self.points[0][0]

    def dense(self, metric: str) -> float | None:
        """Return the unpruned model's metric, in the units that are printed."""
        value = metrics.dense_value(self.first_job, metric)
        return None if value is None else metrics.scaled(metric, value)

    def values(self, metric: str) -> list[Point]:
        """Average the metric at every point where it was measured, in the units that are printed."""
        found = []
        for number, jobs in enumerate(self.points):
            measured = [metrics.value(job, metric) for job in jobs]
            numbers = [metrics.scaled(metric, value) for value in measured if value is not None]
            if numbers:
                mean = statistics.fmean(numbers)
                deviation = statistics.stdev(numbers) if len(numbers) > 1 else 0.0
                found.append(Point(number, mean, deviation))
        return found

    def factors(self, points: Sequence[Point], name: str) -> list[Any]:
        """Return the value of a factor at each of some points."""
        return [factor(self.points[point.number][0], name) for point in points]

    def percentages(self, points: Sequence[Point]) -> list[float]:
        """Return how much was asked to be removed at each of some points."""
        ratios = self.factors(points, "ratio")
        return [100 * ratio for ratio in ratios]

    def mean(self, metric: str) -> float:
        """Return the mean of the line; 0 if it has no points."""
        means = [point.mean for point in self.values(metric)]
        return statistics.fmean(means) if means else 0.0


def by_model(jobs: Jobs) -> list[tuple[str, list[JobResult]]]:
    """Return the finished jobs of each model, with the model's name if there are several models."""
    of_models: dict[Any, list[JobResult]] = {}
    for job in finished(jobs):
        model = factor(job, "model")
        of_models.setdefault(model, []).append(job)
    if len(of_models) == 1:
        return [("", members) for members in of_models.values()]
    return [(str(model), members) for model, members in of_models.items()]


def series_of(jobs: Jobs, entry: Entry, x: str) -> list[Series]:
    """Return the lines in order of appearance, each with its points in order of x.

    Jobs of one point are averaged over the entry's `average_over`. A line has one point for every x: other
    factors that tell jobs apart make further lines.
    """
    names = [name for name in entry.series if name != x]
    names += telling_apart(jobs, [*names, x], entry.average_over)
    all_series = []
    for label, members in lines_of(jobs, names).items():
        groups = grouped(members, [*names, x], entry.average_over)
        groups.sort(key=lambda group: in_order(factor(group.jobs[0], x)))
        points = tuple(group.jobs for group in groups)
        all_series.append(Series(label, points))
    return all_series


def lines_of(jobs: Jobs, names: Sequence[str]) -> dict[str, list[JobResult]]:
    """Group jobs into lines; a line's label names the factors that vary."""
    shown = varying(jobs, names) or names
    lines: dict[str, list[JobResult]] = {}
    for job in jobs:
        lines.setdefault(describe(job, shown), []).append(job)
    return lines
