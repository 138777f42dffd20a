"""Bars: quality of jobs or averages, side by side.

In: an entry of the layout and its jobs. Out: drawings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from heapr.report.sweep import metrics
from heapr.report.sweep.averages import grouped
from heapr.report.sweep.curves import Drawing, Series, by_model, dense_line, lines_of, logarithmic
from heapr.report.sweep.factors import describe, header, telling_apart
from heapr.report.sweep.published_results import Number
from heapr.report.sweep.report_layout import Entry
from heapr.report.sweep.results import JobResult
from heapr.report.sweep.style import COLOURS, legend_above, panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def bars(entry: Entry, jobs: Sequence[JobResult], published: Sequence[Number]) -> list[Drawing]:
    """Draw one bar per job or average, a panel per metric.

    The values of the entry's x are listed down the side; each series has a colour, each model a figure.
    """
    drawings = []
    for model, of_model in by_model(jobs):
        series_names = [name for name in entry.series if name != entry.x]
        names = [entry.x, *telling_apart(of_model, [entry.x, *series_names], entry.average_over)]
        categories = list(dict.fromkeys(describe(job, names) for job in of_model))
        lines = lines_of(of_model, series_names)
        identifying = [*names, *entry.series]
        all_series = []
        for label, members in lines.items():
            groups = grouped(members, identifying, entry.average_over)
            series = Series(label, tuple(group.jobs for group in groups))
            all_series.append(series)
        height_of_category = 0.15 * len(all_series) + 0.05
        height = 0.4 + height_of_category * len(categories)
        figure, axes = panels(len(entry.metrics), height=height)
        for axis, name in zip(axes, entry.metrics, strict=True):
            _bar_panel(axis, name, all_series, categories, names)
            dense_line(axis, name, of_model, upright=True)
            axis.set_xlabel(metrics.axis_label(name))
            axis.set_ylabel(header(entry.x))
        _share_bar_scale(axes, entry.metrics, all_series)
        legend_above(figure, axes, title=model)
        drawings.append(Drawing(figure, model))
    return drawings


def _bar_panel(
    axis: Axes, metric: str, all_series: Sequence[Series], categories: Sequence[str], names: Sequence[str]
) -> None:
    thickness = 0.8 / len(all_series)
    middle = (len(all_series) - 1) / 2
    for number, series in enumerate(all_series):
        points = series.values(metric)
        means = [point.mean for point in points]
        deviations = [point.deviation for point in points]
        ys = []
        for point in points:
            category = describe(series.points[point.number][0], names)
            ys.append(categories.index(category) + thickness * (number - middle))
        label = series.label if len(all_series) > 1 else None
        errors = deviations if any(deviations) else None
        axis.barh(
            ys,
            means,
            height=0.9 * thickness,
            color=COLOURS[number % len(COLOURS)],
            label=label,
            xerr=errors,
            error_kw={"capsize": 1.5, "linewidth": 0.8},
        )
        # In a column beside the panel, where nothing crosses them.
        beside: dict[str, Any] = {"transform": axis.get_yaxis_transform(), "va": "center", "fontsize": 7}
        for y, mean in zip(ys, means, strict=True):
            axis.text(1.02, y, metrics.printed(metric, mean), **beside)
    axis.set_yticks(range(len(categories)), categories)
    axis.set_ylim(len(categories) - 0.5, -0.5)
    axis.grid(visible=False, axis="y")


def _share_bar_scale(axes: Sequence[Axes], names: Sequence[str], all_series: Sequence[Series]) -> None:
    """Make the bars of all perplexities logarithmic if one of them spans more than a factor of 8."""
    ends = []
    for axis, name in zip(axes, names, strict=True):
        if name.startswith("perplexity/"):
            means = [point.mean for series in all_series for point in series.values(name)]
            lowest = min(means, default=1.0)
            highest = max(means, default=1.0)
            ends.append((axis, lowest, highest))
    if any(lowest <= 0 for _, lowest, _ in ends):
        return
    if any(highest / lowest > 8 for _, lowest, highest in ends):
        for axis, lowest, highest in ends:
            logarithmic(axis, highest / lowest, which="x")
            axis.set_xlim(left=lowest / 2)
