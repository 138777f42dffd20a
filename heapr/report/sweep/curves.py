"""Lines: quality against the share removed, and against calibration size.

In: an entry of the layout, its jobs, published numbers. Out: drawings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from heapr.report.sweep import metrics
from heapr.report.sweep.published_results import Numbers, curve
from heapr.report.sweep.report_layout import Entry
from heapr.report.sweep.results import Jobs, finished
from heapr.report.sweep.scales import cut_off_weak, factor_axis, places_of, ratio_axis, share_logarithmic
from heapr.report.sweep.series import Point, Series, by_model, series_of
from heapr.report.sweep.style import DENSE_LINE, PUBLISHED, UNPRUNED, legend_above, look, panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FLOPS, ROUTED_FLOPS = "size/flops_removed_ratio", "size/flops_routed_removed_ratio"
REMOVED = "size/atomic_experts_removed_ratio"
# A published point, over the look of our line.
HOLLOW_POINT = {"linestyle": "none", "markerfacecolor": "white", "markersize": 6.5}


@dataclass(frozen=True)
class Drawing:
    """A figure, with the words that go beside it.

    Attributes:
        figure: what is drawn.
        about: the model or job that is drawn, added to the entry's title.
        missing: what could not be drawn, and why.
        caption: what the figure shows beyond what its kind always shows.
        shares: panels of shares, which have one scale in a report.
    """

    figure: Figure
    about: str = ""
    missing: str = ""
    caption: str = ""
    shares: tuple[Axes, ...] = ()


def ratio_curve(entry: Entry, jobs: Jobs, published: Numbers) -> list[Drawing]:
    """Draw quality and FLOPs saved against the share removed, with published points beside ours.

    Every model has a figure of its own.
    """
    drawings = []
    for model, of_model in by_model(jobs):
        names = _with_flops(entry.metrics, of_model)
        figure, axes = panels(len(names), height=1.9)
        all_series = series_of(of_model, entry, x="ratio")
        for axis, name in zip(axes, names, strict=True):
            for number, series in enumerate(all_series):
                _ratio_line(axis, series, name, number, published)
        beyond = []
        for axis, name in zip(axes, names, strict=True):
            beyond.append(_cut_off(axis, name, all_series))
        finish_axes(axes, names, of_model)
        for axis in axes:
            ratio_axis(axis, of_model, from_zero=True)
        legend_above(figure, axes, title=model)
        caption = " ".join(filter(None, beyond))
        drawings.append(Drawing(figure, model, caption=caption))
    return drawings


def _with_flops(names: Sequence[str], jobs: Jobs) -> list[str]:
    """Return the metrics to draw: those asked for, the FLOPs saved, and those of the routed experts alone."""
    first = finished(jobs)[0]
    shown = list(names)
    for name in (FLOPS, ROUTED_FLOPS):
        is_there = metrics.value(first, name) is not None
        if is_there and name not in shown:
            shown.append(name)
    return shown


def _cut_off(axis: Axes, name: str, all_series: Sequence[Series]) -> str:
    """Let lines leave the panel that would set its scale alone, and say which and how far they go."""
    if metrics.better(name) != metrics.LOWER or name.startswith("size/"):
        return ""
    dense = all_series[0].dense(name)
    if dense is None:
        return ""
    highest = {}
    for series in all_series:
        means = [point.mean for point in series.values(name)]
        if means:
            highest[series.label] = max(means)
    increases = {label: number - dense for label, number in highest.items()}
    weak = cut_off_weak(axis, increases, dense)
    if not weak:
        return ""
    ends = []
    for label in weak:
        end = metrics.printed(name, highest[label])
        ends.append(f"{label} up to {end}")
    listed = ", ".join(ends)
    return f"Beyond the top of {metrics.label(name)}: {listed}."


def calibration_curve(entry: Entry, jobs: Jobs, published: Numbers) -> list[Drawing]:
    """Draw quality against the size of the calibration set, or another factor.

    Error bars show the spread of the jobs that are averaged. Every model has a figure of its own.
    """
    drawings = []
    for model, of_model in by_model(jobs):
        places = places_of(of_model, entry.x)
        figure, axes = panels(len(entry.metrics), height=2.2)
        all_series = series_of(of_model, entry, x=entry.x)
        for axis, name in zip(axes, entry.metrics, strict=True):
            for number, series in enumerate(all_series):
                points = series.values(name)
                values = series.factors(points, entry.x)
                xs = [places[value] for value in values]
                _error_bars(axis, xs, points, series.label, look(number))
        finish_axes(axes, entry.metrics, of_model)
        for axis in axes:
            factor_axis(axis, entry.x, places)
        legend_above(figure, axes, title=model)
        drawings.append(Drawing(figure, model))
    return drawings


def finish_axes(axes: Sequence[Axes], names: Sequence[str], jobs: Jobs) -> None:
    """Add the unpruned model's lines and the labels, and choose the scales.

    Perplexities are logarithmic where one of them spans more than a factor of 4, in all panels alike.
    """
    perplexities = []
    for axis, name in zip(axes, names, strict=True):
        dense_line(axis, name, jobs, upright=False)
        axis.set_ylabel(metrics.axis_label(name))
        if name.startswith("perplexity/"):
            perplexities.append(axis)
        elif name in {FLOPS, ROUTED_FLOPS}:
            axis.set_ylim(bottom=0)
    share_logarithmic(perplexities, least_span=4)


def draw_line(
    axis: Axes, xs: Sequence[float], points: Sequence[Point], label: str, how: dict[str, Any]
) -> None:
    """Draw a line, with error bars if any of its points has a deviation."""
    if any(point.deviation for point in points):
        _error_bars(axis, xs, points, label, how)
        return
    means = [point.mean for point in points]
    axis.errorbar(xs, means, capsize=2, label=label, **how)


def _error_bars(
    axis: Axes, xs: Sequence[float], points: Sequence[Point], label: str, how: dict[str, Any]
) -> None:
    """Draw a line with an error bar at every point, of no length where the deviation is zero."""
    means = [point.mean for point in points]
    deviations = [point.deviation for point in points]
    axis.errorbar(xs, means, yerr=deviations, capsize=2, label=label, **how)


def dense_line(axis: Axes, metric: str, jobs: Jobs, *, upright: bool) -> None:
    if metric.startswith("size/"):
        return
    measured = [metrics.value(job, metric, dense=True) for job in jobs]
    values = [metrics.scaled(metric, value) for value in measured if value is not None]
    if values:
        draw = axis.axvline if upright else axis.axhline
        first = values[0]
        draw(first, label=UNPRUNED, zorder=1.5, **DENSE_LINE)


def _ratio_line(axis: Axes, series: Series, metric: str, number: int, published: Numbers) -> None:
    """Draw our line over the share that was really removed, from the unpruned model on.

    Published points are drawn over the share asked for.
    """
    how = look(number) | {"zorder": 3 - 0.01 * number}  # the first lines lie on top
    points = series.values(metric)
    asked = series.factors(points, "ratio")
    reached = {point.number: point.mean for point in series.values(REMOVED)}
    xs = []
    for point, ratio in zip(points, asked, strict=True):
        x = reached.get(point.number, 100 * ratio)
        xs.append(x)
    dense = series.dense(metric)
    if dense is not None:
        xs.insert(0, 0.0)
        unpruned = Point(-1, dense, 0.0)
        points = [unpruned, *points]
    draw_line(axis, xs, points, series.label, how)
    _published_points(axis, series, metric, look(number) | HOLLOW_POINT, published)


def _published_points(
    axis: Axes, series: Series, metric: str, how: dict[str, Any], published: Numbers
) -> None:
    """Draw the published numbers of the line's method, if there are any."""
    theirs = curve(published, series.first_job, metric)
    if not theirs:
        return
    xs = [100 * ratio for ratio, _ in theirs]
    ys = [metrics.scaled(metric, value) for _, value in theirs]
    label = f"{series.label}{PUBLISHED}"
    axis.plot(xs, ys, label=label, zorder=1.8, **how)
