"""Predicted against measured increase of the loss, by score quantile.

In: an entry of the layout and its jobs, whose `truth` evaluations are read. Out: drawings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from heapr.report.sweep import metrics
from heapr.report.sweep.curves import Drawing
from heapr.report.sweep.factors import describe, varying
from heapr.report.sweep.published_results import Numbers
from heapr.report.sweep.report_layout import Entry
from heapr.report.sweep.results import JobResult, Jobs, details, stage_entries
from heapr.report.sweep.series import by_model
from heapr.report.sweep.style import DENSE_LINE, WIDTH, legend_above, look

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PREDICTED, SCORE, MEASURED = "predicted_increase", "score_sum", "measured_increase"
NO_LINE = {"linestyle": "none"}
CROSS = {"marker": "x", "label": "not above zero, at the edge"}

Groups = Sequence[Mapping[str, float]]  # one mapping per score quantile
PointXY = tuple[float, float]


@dataclass(frozen=True)
class Measurement:
    """The `truth` evaluation of a job.

    Attributes:
        job: the first with these scores.
        groups: its score quantiles.
    """

    job: JobResult
    groups: Groups

    @property
    def predicts(self) -> bool:
        """Whether its criterion predicts increases in nats."""
        return all(PREDICTED in group for group in self.groups)

    def points(self, across: str) -> list[PointXY]:
        """Return one point per quantile: `PREDICTED` or `SCORE`, and the measured increase in nats."""
        return [(group[across], group[MEASURED]) for group in self.groups]


def consistency(entry: Entry, jobs: Jobs, published: Numbers) -> list[Drawing]:
    """Draw one point per quantile on logarithmic axes, and the line where prediction equals measurement.

    Scores without a unit do not predict nats. They are drawn, as bare scores, only if no criterion of the
    model predicts nats. Increases at or below zero do not fit on a logarithmic axis and become crosses on its
    edge.
    """
    drawings = []
    for model, jobs_of_model in by_model(jobs):
        measurements = _measurements(jobs_of_model)
        in_nats = [measurement for measurement in measurements if measurement.predicts]
        if in_nats:
            figure = _figure(in_nats, PREDICTED, entry, model)
        elif measurements:
            figure = _figure(measurements, SCORE, entry, model)
        else:
            continue
        drawings.append(Drawing(figure, model))
    return drawings


def _figure(measurements: Sequence[Measurement], across: str, entry: Entry, model: str) -> Figure:
    """Draw all measurements of a model over `PREDICTED` or over `SCORE`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 0.62 * WIDTH), layout="constrained")
    axis = figure.subplots()
    jobs = [measurement.job for measurement in measurements]
    names = varying(jobs, entry.series) or list(entry.series)
    all_groups = [group for measurement in measurements for group in measurement.groups]
    edges = (_edge(all_groups, across), _edge(all_groups, MEASURED))
    for number, measurement in enumerate(measurements):
        points = measurement.points(across)
        label = _label(measurement.job, names)
        _scatter(axis, points, edges, label=label, how=look(number) | NO_LINE)
    _finish(axis, across)
    legend_above(figure, [axis], title=model)
    return figure


def _measurements(jobs: Jobs) -> list[Measurement]:
    """Read every `truth` artifact once; jobs with the same scores share one."""
    found: dict[str, Measurement] = {}
    for job in jobs:
        entries = stage_entries(job, "truth")
        truth = details(job, "truth")
        if entries and truth is not None:
            key = entries[0]["key"]
            found.setdefault(key, Measurement(job, truth["groups"]))
    return list(found.values())


def _edge(groups: Groups, name: str) -> float:
    """Where values at or below zero are drawn: at half of the smallest positive value."""
    positive = [group[name] for group in groups if group[name] > 0]
    return min(positive, default=1.0) / 2


def _scatter(
    axis: Axes, points: Sequence[PointXY], edges: PointXY, *, label: str, how: dict[str, Any]
) -> None:
    """Draw the points that fit on logarithmic axes, and crosses on the edges for the others."""
    inside: list[PointXY] = []
    at_the_edge: list[PointXY] = []
    for x, y in points:
        if x > 0 and y > 0:
            inside.append((x, y))
            continue
        edge_x, edge_y = edges
        shown_x = x if x > 0 else edge_x
        shown_y = y if y > 0 else edge_y
        at_the_edge.append((shown_x, shown_y))
    _plot(axis, inside, how | {"label": label})
    if at_the_edge:
        _plot(axis, at_the_edge, how | CROSS)


def _plot(axis: Axes, points: Sequence[PointXY], how: dict[str, Any]) -> None:
    xs = [x for x, _ in points]
    ys = [y for _, y in points]
    axis.plot(xs, ys, **how)


def _label(job: JobResult, names: Sequence[str]) -> str:
    """Return the series and its correlations; undefined correlations are left out."""
    series = describe(job, names)
    correlations = []
    for name in ("spearman", "pearson"):
        value = metrics.value(job, f"truth/{name}")
        if value is not None:
            text = f"{name.title()} {value:.2f}"
            correlations.append(text.replace("-", "−"))
    if not correlations:
        return series
    return f"{series}: {', '.join(correlations)}"


def _finish(axis: Axes, across: str) -> None:
    """Label the axes; where both are in nats, give them one scale and the line where they agree."""
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_ylabel("measured increase of the loss (nats)")
    if across == SCORE:
        axis.set_xlabel("sum of the scores removed (no unit)")
        return
    axis.set_xlabel("predicted increase of the loss (nats)")
    ends = [*axis.get_xlim(), *axis.get_ylim()]
    low_high = [min(ends), max(ends)]
    axis.plot(low_high, low_high, label="predicted = measured", zorder=1.5, **DENSE_LINE)
    axis.set_xlim(*low_high)
    axis.set_ylim(*low_high)
    axis.set_aspect("equal")
