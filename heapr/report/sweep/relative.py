"""Tables and curves of shares: a metric's increase over the dense model's, divided by a baseline's increase.

In: an entry of the layout and the jobs of a sweep. Out: a table, or drawings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from heapr.report.sweep import metrics
from heapr.report.sweep.curves import Drawing, draw_line
from heapr.report.sweep.doubt import explanation, is_doubtful
from heapr.report.sweep.factors import selected, show
from heapr.report.sweep.published_results import Numbers
from heapr.report.sweep.report_layout import Entry
from heapr.report.sweep.results import JobResult, Jobs
from heapr.report.sweep.scales import one_scale, ratio_axis
from heapr.report.sweep.series import Point, Series, by_model, series_of
from heapr.report.sweep.shares import Remarks, columns_of, share_name, with_shares
from heapr.report.sweep.style import DENSE_LINE, HOLLOW, legend_above, look, panels
from heapr.report.sweep.table import build_table
from heapr.report.sweep.table_parts import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LEAST_SPAN = 8  # of shares on a logarithmic axis
HOLLOW_POINT: dict[str, Any] = {"linestyle": "none", "markerfacecolor": "white"}
HOLLOW_IN_LEGEND: dict[str, Any] = {"color": "grey", "marker": "o", **HOLLOW_POINT}


def relative_table(entry: Entry, jobs: Jobs, published: Numbers) -> Table:
    """Build a table of shares; a job without a baseline is a gap with a note."""
    shared, remarks = with_shares(entry, jobs)
    of_shares = replace(entry, metrics=columns_of(entry))
    return build_table(of_shares, shared, (), remarks)


def relative_curve(entry: Entry, jobs: Jobs, published: Numbers) -> list[Drawing]:
    """Draw shares against the ratio, a panel per metric; the baseline itself is the line at 1.

    Every model has a figure of its own.
    """
    shared, remarks = with_shares(entry, jobs)
    columns = columns_of(entry)
    others = _others(entry, shared)
    drawings = []
    for model, of_model in by_model(others):
        all_series = series_of(of_model, entry, x="ratio")
        figure, of_shares = _figure(entry, of_model, all_series, columns)
        not_drawn = _not_drawn(of_model, columns, remarks)
        hollow = _hollow(all_series, columns)
        sentences = filter(None, (not_drawn, hollow))
        missing = " ".join(sentences)
        drawings.append(Drawing(figure, model, missing, shares=tuple(of_shares)))
    return drawings


def _others(entry: Entry, jobs: Jobs) -> list[JobResult]:
    """Return the jobs that the entry selects, without the baselines, whose shares are 1."""
    chosen = selected(jobs, entry.where)
    baselines = selected(chosen, entry.baseline)
    numbers = {job.number for job in baselines}
    return [job for job in chosen if job.number not in numbers]


def _figure(
    entry: Entry, jobs: Jobs, all_series: Sequence[Series], columns: Sequence[str]
) -> tuple[Figure, list[Axes]]:
    """Draw a panel for each column; the legend lists the lines from the highest to the lowest.

    Returns:
        The figure, and those of its panels that show shares.
    """
    figure, axes = panels(len(columns), height=2.1)
    first_column = columns[0]
    heights = [series.mean(first_column) for series in all_series]
    # A line keeps its number, and so its look, wherever it stands.
    numbers = range(len(all_series))
    from_the_highest = sorted(numbers, key=heights.__getitem__, reverse=True)
    for axis, column in zip(axes, columns, strict=True):
        for number in from_the_highest:
            series = all_series[number]
            _line(axis, series, column, number)
    of_shares = _finish(axes, entry)
    for axis in axes:
        ratio_axis(axis, jobs)
    legend_above(figure, axes)
    return figure, of_shares


def _not_drawn(jobs: Jobs, columns: Sequence[str], remarks: Remarks) -> str:
    """Name the jobs that lack a share."""
    lacking = {number for number, column in remarks if column in columns}
    named = [str(job.number) for job in jobs if job.number in lacking]
    if not named:
        return ""
    listed = ", ".join(named)
    return f"Not drawn, because the baseline or a number is missing: jobs {listed}."


def _hollow(all_series: Sequence[Series], columns: Sequence[str]) -> str:
    """Say what hollow points mean, if there are any."""
    points = [point for series in all_series for point in series.points]
    return explanation(points, columns, mark="Hollow")


def _line(axis: Axes, series: Series, metric: str, number: int) -> None:
    """Draw a line of shares, with hollow marks where the baseline's increase may be chance."""
    how = look(number)
    points = series.values(metric)
    xs = series.percentages(points)
    draw_line(axis, xs, points, series.label, how)
    doubtful = []
    for point in points:
        jobs = series.points[point.number]
        if is_doubtful(jobs, metric):
            doubtful.append(point)
    if doubtful:
        _hollow_marks(axis, series, doubtful, how)


def _hollow_marks(axis: Axes, series: Series, points: Sequence[Point], how: dict[str, Any]) -> None:
    """Make points of a line hollow, and say in the legend what that means."""
    xs = series.percentages(points)
    means = [point.mean for point in points]
    hollow = how | HOLLOW_POINT
    axis.plot(xs, means, zorder=3, **hollow)
    # Nothing is drawn: the legend has one entry, whatever the colours of the lines.
    axis.plot([], [], label=HOLLOW, **HOLLOW_IN_LEGEND)


def _finish(axes: Sequence[Axes], entry: Entry) -> list[Axes]:
    """Add the labels and the baseline's line, give all shares one scale, and return the panels of shares."""
    of_shares = []
    for axis, metric in zip(axes, entry.metrics, strict=True):
        column = share_name(metric)
        if column == metric:
            label = metrics.axis_label(metric)
        else:
            label = metrics.label(column).replace(", ", ",\n")
            _baseline_line(axis, entry)
            of_shares.append(axis)
        axis.set_ylabel(label)
    if of_shares:
        one_scale(of_shares, least_span=LEAST_SPAN)
    return of_shares


def _baseline_line(axis: Axes, entry: Entry) -> None:
    """Draw the baseline, whose shares are 1, with the values that make it the baseline as its label."""
    values = [show(name, value) for name, value in entry.baseline.items()]
    name = " ".join(values)
    axis.axhline(1.0, label=f"{name} (baseline)", zorder=1.5, **DENSE_LINE)
