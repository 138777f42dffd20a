"""Predicted against measured increase of the loss, by score quantile.

In: an entry of the layout and its jobs, whose `truth` evaluations are read. Out: drawings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from heapr.report.sweep import metrics
from heapr.report.sweep.curves import Drawing, by_model
from heapr.report.sweep.factors import describe, varying
from heapr.report.sweep.published_results import Number
from heapr.report.sweep.report_layout import Entry
from heapr.report.sweep.results import JobResult, details, stage_entries
from heapr.report.sweep.style import DENSE_LINE, WIDTH, legend_above, look

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PREDICTED, SCORE, MEASURED = "predicted_increase", "score_sum", "measured_increase"


def consistency(entry: Entry, jobs: Sequence[JobResult], published: Sequence[Number]) -> list[Drawing]:
    """A point per quantile, both axes logarithmic, and the line on which prediction and measurement agree.

    Criteria without a unit predict nothing in nats: they are drawn only where no criterion has one, against
    their bare scores. Increases that are not above zero have no place on a logarithmic axis: they are drawn
    as crosses on its edge.
    """
    from matplotlib.figure import Figure

    drawings = []
    for model, of_model in by_model(jobs):
        found = _measurements(of_model)
        with_unit = [(job, groups) for job, groups in found if all(PREDICTED in group for group in groups)]
        chosen, across = (with_unit, PREDICTED) if with_unit else (found, SCORE)
        if not chosen:
            continue
        figure = Figure(figsize=(WIDTH, WIDTH), layout="constrained")
        axis = figure.subplots()
        names = varying([job for job, _ in chosen], entry.series) or list(entry.series)
        low = _lowest([group for _, groups in chosen for group in groups], across)
        for number, (job, groups) in enumerate(chosen):
            _scatter(
                axis, groups, across, low, {**look(number), "linestyle": "none", "label": _label(job, names)}
            )
        _finish(axis, across)
        legend_above(figure, [axis], title=model)
        drawings.append(Drawing(figure, model))
    return drawings


def _measurements(jobs: Sequence[JobResult]) -> list[tuple[JobResult, list[Mapping[str, float]]]]:
    """Of every `truth` artifact once: it depends on the scores alone, so jobs share it."""
    found: dict[str, tuple[JobResult, list[Mapping[str, float]]]] = {}
    for job in jobs:
        entries, truth = stage_entries(job, "truth"), details(job, "truth")
        if entries and truth is not None:
            found.setdefault(entries[0]["key"], (job, truth["groups"]))
    return list(found.values())


def _lowest(groups: Sequence[Mapping[str, float]], across: str) -> tuple[float, float]:
    """Where what is not above zero is drawn: half of the least that is, in either direction."""
    least = [
        min((group[name] for group in groups if group[name] > 0), default=1.0) for name in (across, MEASURED)
    ]
    return least[0] / 2, least[1] / 2


def _scatter(
    axis: Axes,
    groups: Sequence[Mapping[str, float]],
    across: str,
    low: tuple[float, float],
    how: dict[str, Any],
) -> None:
    inside = [group for group in groups if group[across] > 0 and group[MEASURED] > 0]
    axis.plot([group[across] for group in inside], [group[MEASURED] for group in inside], **how)
    edge = [group for group in groups if group not in inside]
    if edge:
        xs = [group[across] if group[across] > 0 else low[0] for group in edge]
        ys = [group[MEASURED] if group[MEASURED] > 0 else low[1] for group in edge]
        axis.plot(xs, ys, **{**how, "marker": "x", "label": "not above zero, at the edge"})


def _label(job: JobResult, names: Sequence[str]) -> str:
    """The series and how well it predicts; a correlation that is not defined is left out."""
    numbers = [(name, metrics.value(job, f"truth/{name}")) for name in ("spearman", "pearson")]
    correlations = ", ".join(
        f"{name.title()} {value:.2f}".replace("-", "−") for name, value in numbers if value is not None
    )
    return f"{describe(job, names)}: {correlations}" if correlations else describe(job, names)


def _finish(axis: Axes, across: str) -> None:
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_ylabel("measured increase of the loss (nats)")
    if across == SCORE:
        axis.set_xlabel("sum of the scores removed (no unit)")
        return
    axis.set_xlabel("predicted increase of the loss (nats)")
    low, high = min(axis.get_xlim()[0], axis.get_ylim()[0]), max(axis.get_xlim()[1], axis.get_ylim()[1])
    axis.plot([low, high], [low, high], label="predicted = measured", zorder=1.5, **DENSE_LINE)
    axis.set_xlim(low, high)
    axis.set_ylim(low, high)
    axis.set_aspect("equal")
