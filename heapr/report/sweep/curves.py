"""Lines: quality against the share removed, and against calibration size.

In: an entry of the layout, its jobs, published numbers. Out: drawings.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from heapr.report.sweep import metrics
from heapr.report.sweep.averages import grouped
from heapr.report.sweep.factors import (
    UNKNOWN,
    describe,
    factor,
    header,
    in_order,
    show,
    telling_apart,
    varying,
)
from heapr.report.sweep.published_results import Number, curve
from heapr.report.sweep.report_layout import Entry
from heapr.report.sweep.results import JobResult, finished
from heapr.report.sweep.style import DENSE_LINE, PUBLISHED, UNPRUNED, legend_above, look, panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FLOPS, REMOVED = "size/flops_removed_ratio", "size/atomic_experts_removed_ratio"


@dataclass(frozen=True)
class Drawing:
    """A figure, with the words that go beside it.

    Attributes:
        figure: what is drawn.
        about: the model or job that is drawn, added to the entry's title.
        missing: what could not be drawn, and why.
    """

    figure: Figure
    about: str = ""
    missing: str = ""


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

    def values(self, metric: str) -> list[Point]:
        """Average the metric at every point where it was measured, in the units that are printed."""
        found = []
        for number, jobs in enumerate(self.points):
            measured = [metrics.value(job, metric) for job in jobs]
            numbers = [metrics.scaled(metric, value) for value in measured if value is not None]
            if numbers:
                deviation = statistics.stdev(numbers) if len(numbers) > 1 else 0.0
                found.append(Point(number, statistics.fmean(numbers), deviation))
        return found

    def factors(self, points: Sequence[Point], name: str) -> list[Any]:
        """Return the value of a factor at each of some points."""
        return [factor(self.points[point.number][0], name) for point in points]


def ratio_curve(entry: Entry, jobs: Sequence[JobResult], published: Sequence[Number]) -> list[Drawing]:
    """Draw quality above FLOPs saved, against the share removed, with published points beside ours.

    Every model has a figure of its own.
    """
    names = list(entry.metrics)
    if FLOPS not in names:
        names.append(FLOPS)
    drawings = []
    for model, of_model in by_model(jobs):
        figure, axes = panels(len(names), height=1.45, sharex=True)
        all_series = series_of(of_model, entry, x="ratio")
        for axis, name in zip(axes, names, strict=True):
            for number, series in enumerate(all_series):
                _ratio_line(axis, series, name, look(number), published)
        finish_axes(axes, names, of_model)
        ratio_axis(axes[-1], of_model)
        legend_above(figure, axes, title=model)
        drawings.append(Drawing(figure, model))
    return drawings


def calibration_curve(entry: Entry, jobs: Sequence[JobResult], published: Sequence[Number]) -> list[Drawing]:
    """Draw quality against the size of the calibration set, or another factor.

    Error bars show the spread of the jobs that are averaged. Every model has a figure of its own.
    """
    drawings = []
    for model, of_model in by_model(jobs):
        places = _places(of_model, entry.x)
        figure, axes = panels(len(entry.metrics), height=1.75, sharex=True)
        all_series = series_of(of_model, entry, x=entry.x)
        for axis, name in zip(axes, entry.metrics, strict=True):
            for number, series in enumerate(all_series):
                points = series.values(name)
                xs = [places[value] for value in series.factors(points, entry.x)]
                means = [point.mean for point in points]
                deviations = [point.deviation for point in points]
                axis.errorbar(xs, means, yerr=deviations, capsize=2, label=series.label, **look(number))
        finish_axes(axes, entry.metrics, of_model)
        _factor_axis(axes[-1], entry.x, places)
        legend_above(figure, axes, title=model)
        drawings.append(Drawing(figure, model))
    return drawings


def by_model(jobs: Sequence[JobResult]) -> list[tuple[str, list[JobResult]]]:
    """Return the finished jobs of each model, with the model's name if there are several models."""
    of_models: dict[Any, list[JobResult]] = {}
    for job in finished(jobs):
        model = factor(job, "model")
        of_models.setdefault(model, []).append(job)
    if len(of_models) == 1:
        return [("", members) for members in of_models.values()]
    return [(str(model), members) for model, members in of_models.items()]


def series_of(jobs: Sequence[JobResult], entry: Entry, x: str) -> list[Series]:
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
        series = Series(label, tuple(group.jobs for group in groups))
        all_series.append(series)
    return all_series


def finish_axes(axes: Sequence[Axes], names: Sequence[str], jobs: Sequence[JobResult]) -> None:
    """Add the unpruned model's lines and the labels, and choose the scales.

    Perplexities are logarithmic where one of them spans more than a factor of 4, in all panels alike.
    """
    perplexities = []
    for axis, name in zip(axes, names, strict=True):
        dense_line(axis, name, jobs, upright=False)
        axis.set_ylabel(metrics.axis_label(name))
        if name.startswith("perplexity/"):
            perplexities.append(axis)
        elif name == FLOPS:
            axis.set_ylim(bottom=0)
    share_logarithmic(perplexities, least_span=4)


def share_logarithmic(axes: Sequence[Axes], least_span: float) -> bool:
    """Make the vertical axes of all panels logarithmic if one spans enough and none reaches zero.

    Args:
        axes: the panels.
        least_span: a panel whose largest value is more than so many times its smallest needs the scale.

    Returns:
        Whether they are logarithmic now.
    """
    ends = [limits(axis) for axis in axes]
    if any(lowest <= 0 for lowest, _ in ends):
        return False
    spans = [highest / lowest for lowest, highest in ends]
    if max(spans, default=1.0) <= least_span:
        return False
    for axis, span in zip(axes, spans, strict=True):
        logarithmic(axis, span, which="y")
    return True


def draw_line(
    axis: Axes, xs: Sequence[float], points: Sequence[Point], label: str, how: dict[str, Any]
) -> None:
    """Draw a line, with error bars if any of its points has a deviation."""
    means = [point.mean for point in points]
    deviations = [point.deviation for point in points]
    axis.errorbar(xs, means, yerr=deviations if any(deviations) else None, capsize=2, label=label, **how)


def ratio_axis(axis: Axes, jobs: Sequence[JobResult]) -> None:
    """Put ticks at the ratios that were asked for, if there are at most 10."""
    from matplotlib.ticker import FixedLocator, FuncFormatter

    ratios = sorted({100 * factor(job, "ratio") for job in jobs})
    if len(ratios) <= 10:
        axis.xaxis.set_major_locator(FixedLocator(ratios))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
    axis.set_xlabel("atomic experts removed (%)")


def limits(axis: Axes) -> tuple[float, float]:
    """Return the smallest and the largest y of the lines that are drawn, without margins."""
    import numpy as np

    ys: list[float] = []
    for line in axis.get_lines():
        ys += map(float, np.asarray(line.get_ydata()))
    return min(ys, default=1.0), max(ys, default=1.0)


def logarithmic(axis: Axes, span: float, which: str) -> None:
    """Make an axis logarithmic, with plain numbers at its ticks.

    Args:
        axis: the panel.
        span: largest value divided by the smallest: decides how many ticks there are.
        which: "x" or "y".
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    axis.set(**{f"{which}scale": "log"})
    scale = axis.yaxis if which == "y" else axis.xaxis
    lowest, highest = scale.get_view_interval()
    if max(span, highest / lowest) < 4:
        # A range this narrow may contain none of the round numbers of a logarithmic axis.
        scale.set_major_locator(MaxNLocator(4, steps=[1, 2.5, 5, 10]))
    elif span < 10:
        scale.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 5.0, 7.0)))
    elif span < 500:
        scale.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    else:
        scale.set_major_locator(LogLocator(subs=(1.0,)))
    scale.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    scale.set_minor_formatter(NullFormatter())


def lines_of(jobs: Sequence[JobResult], names: Sequence[str]) -> dict[str, list[JobResult]]:
    """Group jobs into lines; a line's label names the factors that vary."""
    shown = varying(jobs, names) or names
    lines: dict[str, list[JobResult]] = {}
    for job in jobs:
        lines.setdefault(describe(job, shown), []).append(job)
    return lines


def _ratio_line(
    axis: Axes, series: Series, metric: str, how: dict[str, Any], published: Sequence[Number]
) -> None:
    points = series.values(metric)
    reached = {point.number: point.mean for point in series.values(REMOVED)}
    xs = []
    for point, ratio in zip(points, series.factors(points, "ratio"), strict=True):
        xs.append(reached.get(point.number, 100 * ratio))
    draw_line(axis, xs, points, series.label, how)
    theirs = curve(published, series.points[0][0], metric)
    if theirs:
        xs = [100 * ratio for ratio, _ in theirs]
        ys = [metrics.scaled(metric, value) for _, value in theirs]
        hollow = how | {"linestyle": "none", "markerfacecolor": "white", "markersize": 6.5}
        axis.plot(xs, ys, label=f"{series.label}{PUBLISHED}", zorder=1.8, **hollow)


def dense_line(axis: Axes, metric: str, jobs: Sequence[JobResult], *, upright: bool) -> None:
    if metric.startswith("size/"):
        return
    measured = [metrics.value(job, metric, dense=True) for job in jobs]
    values = [metrics.scaled(metric, value) for value in measured if value is not None]
    if values:
        draw = axis.axvline if upright else axis.axhline
        draw(values[0], label=UNPRUNED, zorder=1.5, **DENSE_LINE)


def _places(jobs: Sequence[JobResult], x: str) -> dict[Any, float]:
    """Map every value of a factor to its place on the axis: itself if all are numbers, else its rank."""
    known = {factor(job, x) for job in jobs} - {UNKNOWN}
    values = sorted(known, key=in_order)
    if all(isinstance(value, int | float) for value in values):
        return {value: float(value) for value in values}
    return {value: float(rank) for rank, value in enumerate(values)}


def _factor_axis(axis: Axes, x: str, places: dict[Any, float]) -> None:
    """Put ticks at the values that were run; sizes that grow by factors get a logarithmic axis."""
    from matplotlib.ticker import FixedLocator, NullLocator

    numbers = list(places.values())
    if x in {"num_samples", "sequence_length"} and len(numbers) > 1:
        axis.set_xscale("log", base=2)
    axis.xaxis.set_major_locator(FixedLocator(numbers))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xticklabels([show(x, value) for value in places])
    axis.set_xlabel(header(x))
