"""Lines and bars: quality against the share removed, against calibration size, and side by side.

In: an entry of the layout, its jobs, published numbers. Out: drawings.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from heapr.report.sweep import metrics
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
from heapr.report.sweep.style import COLOURS, DENSE_LINE, PUBLISHED, UNPRUNED, legend_above, look, panels
from heapr.report.sweep.table import grouped

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FLOPS, REMOVED = "size/flops_removed_ratio", "size/atomic_experts_removed_ratio"


@dataclass(frozen=True)
class Drawing:
    """A figure, what to add to the entry's title (of which model or job it is), and what is missing in it."""

    figure: Figure
    about: str = ""
    missing: str = ""


@dataclass(frozen=True)
class Series:
    """Jobs of one line: one list per point, of the jobs that are averaged there."""

    label: str
    points: tuple[tuple[JobResult, ...], ...]

    def values(self, metric: str) -> list[tuple[int, float, float]]:
        """Number of the point, mean and sample standard deviation (0 of one job), in printed units, where
        there is a value."""
        found = []
        for number, jobs in enumerate(self.points):
            numbers = [
                metrics.scaled(metric, value)
                for job in jobs
                if (value := metrics.value(job, metric)) is not None
            ]
            if numbers:
                found.append(
                    (
                        number,
                        statistics.fmean(numbers),
                        statistics.stdev(numbers) if len(numbers) > 1 else 0.0,
                    )
                )
        return found


def ratio_curve(entry: Entry, jobs: Sequence[JobResult], published: Sequence[Number]) -> list[Drawing]:
    """Quality above, FLOPs saved below, against the share removed; one figure per model, published points
    beside ours."""
    drawings = []
    for model, of_model in by_model(jobs):
        names = [*entry.metrics, *([FLOPS] if FLOPS not in entry.metrics else [])]
        figure, axes = panels(len(names), height=1.45, sharex=True)
        all_series = series_of(of_model, entry, x="ratio")
        for axis, name in zip(axes, names, strict=True):
            for number, series in enumerate(all_series):
                _ratio_line(axis, series, name, look(number), published)
            finish_axis(axis, name, of_model)
        ratio_axis(axes[-1], of_model)
        legend_above(figure, axes, title=model)
        drawings.append(Drawing(figure, model))
    return drawings


def calibration_curve(entry: Entry, jobs: Sequence[JobResult], published: Sequence[Number]) -> list[Drawing]:
    """Quality against the size of the calibration set (or another factor), with error bars over what is
    averaged."""
    drawings = []
    for model, of_model in by_model(jobs):
        places = _places(of_model, entry.x)
        figure, axes = panels(len(entry.metrics), height=1.75, sharex=True)
        all_series = series_of(of_model, entry, x=entry.x)
        for axis, name in zip(axes, entry.metrics, strict=True):
            for number, series in enumerate(all_series):
                found = series.values(name)
                xs = [places[factor(series.points[point][0], entry.x)] for point, _, _ in found]
                errors = [deviation for _, _, deviation in found]
                axis.errorbar(
                    xs,
                    [mean for _, mean, _ in found],
                    yerr=errors,
                    capsize=2,
                    label=series.label,
                    **look(number),
                )
            finish_axis(axis, name, of_model)
        _factor_axis(axes[-1], entry.x, places)
        legend_above(figure, axes, title=model)
        drawings.append(Drawing(figure, model))
    return drawings


def bars(entry: Entry, jobs: Sequence[JobResult], published: Sequence[Number]) -> list[Drawing]:
    """One bar per job or average: what is compared down the side, series by colour, a panel per metric."""
    drawings = []
    for model, of_model in by_model(jobs):
        series_names = [name for name in entry.series if name != entry.x]
        names = [entry.x, *telling_apart(of_model, [entry.x, *series_names], entry.average_over)]
        categories = list(dict.fromkeys(describe(job, names) for job in of_model))
        all_series = [
            _bars_of(members, label, names, entry)
            for label, members in _lines(of_model, series_names).items()
        ]
        figure, axes = panels(
            len(entry.metrics), height=0.4 + (0.15 * len(all_series) + 0.05) * len(categories)
        )
        for axis, name in zip(axes, entry.metrics, strict=True):
            _bar_panel(axis, name, all_series, categories, names)
            _dense_line(axis, name, of_model, upright=True)
            axis.set_xlabel(metrics.axis_label(name))
            axis.set_ylabel(header(entry.x))
        legend_above(figure, axes, title=model)
        drawings.append(Drawing(figure, model))
    return drawings


def by_model(jobs: Sequence[JobResult]) -> list[tuple[str, list[JobResult]]]:
    """Finished jobs of each model, with its name where there are several."""
    done = finished(jobs)
    models = list(dict.fromkeys(factor(job, "model") for job in done))
    return [
        (str(model) if len(models) > 1 else "", [job for job in done if factor(job, "model") == model])
        for model in models
    ]


def series_of(jobs: Sequence[JobResult], entry: Entry, x: str) -> list[Series]:
    """Lines in order of appearance, their points in order of x; jobs of one point are averaged if the entry
    says over what.

    A line has one point for every x: what else tells jobs apart makes further lines.
    """
    names = [name for name in entry.series if name != x]
    names += telling_apart(jobs, [*names, x], entry.average_over)
    series = []
    for label, members in _lines(jobs, names).items():
        points = [group.jobs for group in grouped(members, [*names, x], entry.average_over)]
        series.append(Series(label, tuple(sorted(points, key=lambda group: in_order(factor(group[0], x))))))
    return series


def _lines(jobs: Sequence[JobResult], names: Sequence[str]) -> dict[str, list[JobResult]]:
    """Jobs by the factors that tell lines apart, in words; of those, only the ones that vary are named."""
    shown = varying(jobs, names) or names
    lines: dict[str, list[JobResult]] = {}
    for job in jobs:
        lines.setdefault(describe(job, shown), []).append(job)
    return lines


def _bars_of(jobs: Sequence[JobResult], label: str, names: Sequence[str], entry: Entry) -> Series:
    """The bars of one colour."""
    return Series(
        label, tuple(group.jobs for group in grouped(jobs, [*names, *entry.series], entry.average_over))
    )


def finish_axis(axis: Axes, metric: str, jobs: Sequence[JobResult]) -> None:
    """The unpruned model's line, the label, and a logarithmic scale where values of one quantity span more
    than a factor of 4."""
    _dense_line(axis, metric, jobs, upright=False)
    axis.set_ylabel(metrics.axis_label(metric))
    lowest, highest = limits(axis)
    if metric.startswith("perplexity/") and lowest > 0 and highest / lowest > 4:
        logarithmic(axis, highest / lowest, which="y")
    elif metric == FLOPS:
        axis.set_ylim(bottom=0)


def _ratio_line(
    axis: Axes, series: Series, metric: str, how: dict[str, Any], published: Sequence[Number]
) -> None:
    found, places = series.values(metric), {point: mean for point, mean, _ in series.values(REMOVED)}
    xs = [places.get(point, 100 * factor(series.points[point][0], "ratio")) for point, _, _ in found]
    errors = [deviation for _, _, deviation in found]
    axis.errorbar(
        xs,
        [mean for _, mean, _ in found],
        yerr=errors if any(errors) else None,
        capsize=2,
        label=series.label,
        **how,
    )
    theirs = curve(published, series.points[0][0], metric)
    if theirs:
        ys = [metrics.scaled(metric, value) for _, value in theirs]
        hollow = {**how, "linestyle": "none", "markerfacecolor": "white", "markersize": 6.5}
        axis.plot(
            [100 * ratio for ratio, _ in theirs], ys, label=f"{series.label}{PUBLISHED}", zorder=1.8, **hollow
        )


def ratio_axis(axis: Axes, jobs: Sequence[JobResult]) -> None:
    """Ticks at the ratios that were asked for, as far as they have room."""
    from matplotlib.ticker import FixedLocator, FuncFormatter

    ratios = sorted({100 * factor(job, "ratio") for job in jobs})
    if len(ratios) <= 10:
        axis.xaxis.set_major_locator(FixedLocator(ratios))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
    axis.set_xlabel("atomic experts removed (%)")


def _dense_line(axis: Axes, metric: str, jobs: Sequence[JobResult], *, upright: bool) -> None:
    values = [value for job in jobs if (value := metrics.value(job, metric, dense=True)) is not None]
    if values and not metric.startswith("size/"):
        draw = axis.axvline if upright else axis.axhline
        draw(metrics.scaled(metric, values[0]), label=UNPRUNED, zorder=1.5, **DENSE_LINE)


def limits(axis: Axes) -> tuple[float, float]:
    """Of everything that is drawn upwards, before margins."""
    import numpy as np

    ys = [float(y) for line in axis.get_lines() for y in np.asarray(line.get_ydata())] or [1.0]
    return min(ys), max(ys)


def logarithmic(axis: Axes, span: float, which: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    (axis.set_yscale if which == "y" else axis.set_xscale)("log")
    scale = axis.yaxis if which == "y" else axis.xaxis
    subs = (1.0, 2.0, 3.0, 5.0, 7.0) if span < 10 else (1.0, 2.0, 5.0) if span < 500 else (1.0,)
    scale.set_major_locator(LogLocator(subs=subs))
    scale.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    scale.set_minor_formatter(NullFormatter())


def _places(jobs: Sequence[JobResult], x: str) -> dict[Any, float]:
    """Position of every value on the axis: itself if it is a number, its rank if not."""
    values = sorted({factor(job, x) for job in jobs} - {UNKNOWN}, key=in_order)
    are_numbers = all(isinstance(value, int | float) for value in values)
    return {value: float(value) if are_numbers else float(rank) for rank, value in enumerate(values)}


def _factor_axis(axis: Axes, x: str, places: dict[Any, float]) -> None:
    """Ticks at the values that were run; sizes that grow by factors get a logarithmic axis."""
    from matplotlib.ticker import FixedLocator, NullLocator

    numbers = list(places.values())
    if x in {"num_samples", "sequence_length"} and len(numbers) > 1:
        axis.set_xscale("log", base=2)
    axis.xaxis.set_major_locator(FixedLocator(numbers))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xticklabels([show(x, value) for value in places])
    axis.set_xlabel(header(x))


def _bar_panel(
    axis: Axes, metric: str, all_series: Sequence[Series], categories: Sequence[str], names: Sequence[str]
) -> None:
    thickness = 0.8 / len(all_series)
    widest = max((mean for series in all_series for _, mean, _ in series.values(metric)), default=1.0)
    narrowest = min((mean for series in all_series for _, mean, _ in series.values(metric)), default=1.0)
    islogarithmic = metric.startswith("perplexity/") and narrowest > 0 and widest / narrowest > 8
    for number, series in enumerate(all_series):
        found = series.values(metric)
        rows = [categories.index(describe(series.points[point][0], names)) for point, _, _ in found]
        ys = [row + thickness * (number - (len(all_series) - 1) / 2) for row in rows]
        means, deviations = [mean for _, mean, _ in found], [deviation for _, _, deviation in found]
        axis.barh(
            ys,
            means,
            height=0.9 * thickness,
            color=COLOURS[number % len(COLOURS)],
            label=series.label if len(all_series) > 1 else None,
            xerr=deviations if any(deviations) else None,
            error_kw={"capsize": 1.5, "linewidth": 0.8},
        )
        # In a column beside the panel, where nothing crosses them.
        for y, mean in zip(ys, means, strict=True):
            axis.text(
                1.02,
                y,
                metrics.printed(metric, mean),
                transform=axis.get_yaxis_transform(),
                va="center",
                fontsize=7,
            )
    axis.set_yticks(range(len(categories)), categories)
    axis.set_ylim(len(categories) - 0.5, -0.5)
    axis.grid(visible=False, axis="y")
    if islogarithmic:
        logarithmic(axis, widest / narrowest, which="x")
        axis.set_xlim(left=narrowest / 2)
