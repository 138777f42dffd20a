"""Bars: quality of jobs or averages, side by side.

In: an entry of the layout and its jobs. Out: drawings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from heapr.report.sweep import metrics
from heapr.report.sweep.averages import grouped
from heapr.report.sweep.curves import Drawing, dense_line
from heapr.report.sweep.factors import describe, header, telling_apart
from heapr.report.sweep.published_results import Numbers
from heapr.report.sweep.report_layout import Entry
from heapr.report.sweep.results import Jobs
from heapr.report.sweep.scales import logarithmic
from heapr.report.sweep.series import Point, Series, by_model, lines_of
from heapr.report.sweep.style import COLOURS, legend_above, panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# All perplexities get a logarithmic scale if one of them spans more than this factor.
LEAST_SPAN = 8
CATEGORY_SHARE = 0.8  # of the space between two categories, filled by bars
BAR_SHARE = 0.9  # of a bar's space, filled by the bar
ERROR_BAR = {"capsize": 1.5, "linewidth": 0.8}


@dataclass(frozen=True)
class Chart:
    """The bars of one model.

    Attributes:
        names: factors that make up a category.
        categories: listed down the side.
        all_series: one per colour.
    """

    names: Sequence[str]
    categories: Sequence[str]
    all_series: Sequence[Series]

    @property
    def thickness(self) -> float:
        """Return the space of one bar, where categories are 1 apart."""
        return CATEGORY_SHARE / len(self.all_series)

    def places(self, number: int, points: Sequence[Point]) -> list[float]:
        """Return where the bars of a series lie: side by side, around the middle of their category."""
        series = self.all_series[number]
        middle = (len(self.all_series) - 1) / 2
        shift = self.thickness * (number - middle)
        places = []
        for point in points:
            job = series.points[point.number][0]
            category = describe(job, self.names)
            places.append(self.categories.index(category) + shift)
        return places

    def means(self, metric: str) -> list[float]:
        """Return the lengths of all bars."""
        return [point.mean for series in self.all_series for point in series.values(metric)]


def bars(entry: Entry, jobs: Jobs, published: Numbers) -> list[Drawing]:
    """Draw one bar per job or average, a panel per metric.

    The values of the entry's x are listed down the side; each series has a colour, each model a figure.
    """
    drawings = []
    for model, of_model in by_model(jobs):
        figure = _figure(entry, of_model, model)
        drawings.append(Drawing(figure, model))
    return drawings


def _figure(entry: Entry, jobs: Jobs, model: str) -> Figure:
    chart = _chart(entry, jobs)
    height_of_category = 0.15 * len(chart.all_series) + 0.05
    height = 0.4 + height_of_category * len(chart.categories)
    figure, axes = panels(len(entry.metrics), height=height, most=2)
    for axis, name in zip(axes, entry.metrics, strict=True):
        _bar_panel(axis, name, chart)
        dense_line(axis, name, jobs, upright=True)
        axis.set_xlabel(metrics.axis_label(name))
        axis.set_ylabel(header(entry.x))
    _share_bar_scale(axes, entry.metrics, chart)
    legend_above(figure, axes, title=model)
    return figure


def _chart(entry: Entry, jobs: Jobs) -> Chart:
    """Sort the jobs into bars; factors that would put two bars in one place become part of the category."""
    series_names = [name for name in entry.series if name != entry.x]
    shown = [entry.x, *series_names]
    further = telling_apart(jobs, shown, entry.average_over)
    names = [entry.x, *further]
    categories = dict.fromkeys(describe(job, names) for job in jobs)
    identifying = [*names, *entry.series]
    all_series = []
    for label, members in lines_of(jobs, series_names).items():
        groups = grouped(members, identifying, entry.average_over)
        points = tuple(group.jobs for group in groups)
        all_series.append(Series(label, points))
    return Chart(names, list(categories), all_series)


def _bar_panel(axis: Axes, metric: str, chart: Chart) -> None:
    for number in range(len(chart.all_series)):
        _bars_of_series(axis, metric, chart, number)
    num_categories = len(chart.categories)
    axis.set_yticks(range(num_categories), chart.categories)
    axis.set_ylim(num_categories - 0.5, -0.5)
    axis.grid(visible=False, axis="y")


def _bars_of_series(axis: Axes, metric: str, chart: Chart, number: int) -> None:
    series = chart.all_series[number]
    points = series.values(metric)
    means = [point.mean for point in points]
    deviations = [point.deviation for point in points]
    ys = chart.places(number, points)
    is_one_of_several = len(chart.all_series) > 1
    axis.barh(
        ys,
        means,
        height=BAR_SHARE * chart.thickness,
        color=COLOURS[number % len(COLOURS)],
        label=series.label if is_one_of_several else None,
        xerr=deviations if any(deviations) else None,
        error_kw=ERROR_BAR,
    )
    # In a column beside the panel, where nothing crosses them.
    beside: dict[str, Any] = {"transform": axis.get_yaxis_transform(), "va": "center", "fontsize": 7}
    for y, mean in zip(ys, means, strict=True):
        text = metrics.printed(metric, mean)
        axis.text(1.02, y, text, **beside)


def _share_bar_scale(axes: Sequence[Axes], names: Sequence[str], chart: Chart) -> None:
    """Make the bars of all perplexities logarithmic if one of them spans more than `LEAST_SPAN`."""
    of_perplexities: list[Axes] = []
    lowest: list[float] = []
    spans: list[float] = []
    for axis, name in zip(axes, names, strict=True):
        if name.startswith("perplexity/"):
            means = chart.means(name) or [1.0]
            if min(means) <= 0:
                return
            of_perplexities.append(axis)
            lowest.append(min(means))
            spans.append(max(means) / min(means))
    if max(spans, default=1.0) <= LEAST_SPAN:
        return
    for axis, least, span in zip(of_perplexities, lowest, spans, strict=True):
        logarithmic(axis, span, which="x")
        axis.set_xlim(left=least / 2)
