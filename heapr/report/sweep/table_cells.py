"""The text of a table's cells, and which of them are the best.

In: jobs or groups of them, published numbers, and the name of a metric. Out: text, cells, or places.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from heapr.report.sweep import metrics
from heapr.report.sweep.averages import Group
from heapr.report.sweep.doubt import is_doubtful
from heapr.report.sweep.published_results import Number
from heapr.report.sweep.results import JobResult
from heapr.report.sweep.table_parts import GAP, Cell, Marks


def dense_text(job: JobResult, name: str, number: float | None) -> str:
    """Print a number of the unpruned model, with its standard error where the harness gives one.

    A metric that the unpruned model cannot have is blank; one that was not measured is a gap.
    """
    if number is None:
        kind = name.partition("/")[0]
        return "" if kind in metrics.OF_A_PAIR else GAP
    error = metrics.standard_error(job, name, dense=True)
    return _with_error(name, number, error)


def measured_text(group: Group, name: str) -> str:
    """Print a group's number: one job's with its standard error, or a mean ± the sample standard deviation.

    Args:
        group: at least one of its jobs has the metric.
        name: of the metric.
    """
    values = group.values(name)
    if len(group.jobs) == 1:
        error = metrics.standard_error(group.done[0], name)
        return _with_error(name, values[0], error)
    mean = metrics.text(name, statistics.fmean(values))
    if len(values) == 1:
        return mean
    deviation = metrics.text(name, statistics.stdev(values))
    return f"{mean} ± {deviation}"


def published_cells(
    names: Sequence[str], published: Sequence[Number | None], marks: Mapping[str, Marks]
) -> list[Cell]:
    """Return the cells of published numbers; blank without one.

    Args:
        names: of the metrics.
        published: one number for each of them.
        marks: notes of a cell, by its number's source.
    """
    cells = []
    for name, number in zip(names, published, strict=True):
        cell = Cell()
        if number is not None:
            text = metrics.text(name, number.value)
            notes = marks.get(number.source, ())
            cell = Cell(text, notes)
        cells.append(cell)
    return cells


def difference_cells(
    names: Sequence[str], published: Sequence[Number | None], ours: Sequence[float | None]
) -> list[Cell]:
    """Return the cells of our numbers minus the published ones; blank unless there are both."""
    cells = []
    for name, number, mine in zip(names, published, ours, strict=True):
        cell = Cell()
        if number is not None and mine is not None:
            difference = mine - number.value
            text = metrics.signed(name, difference, mine)
            cell = Cell(text)
        cells.append(cell)
    return cells


def best_places(groups: Sequence[Group], name: str) -> set[int]:
    """Return the places of the groups that print the best value; none if all print the same.

    Doubtful shares do not take part.
    """
    direction = metrics.better(name)
    means: dict[int, float] = {}
    for place, group in enumerate(groups):
        mean = group.mean(name)
        if mean is not None and not is_doubtful(group.jobs, name):
            means[place] = mean
    if direction == 0 or not means:
        return set()
    winner = max(direction * mean for mean in means.values())
    printed = metrics.text(name, direction * winner)
    best = {place for place, mean in means.items() if metrics.text(name, mean) == printed}
    return best if len(best) < len(means) else set()


def _with_error(name: str, number: float, error: float | None) -> str:
    text = metrics.text(name, number)
    if error is None:
        return text
    return f"{text} ({metrics.text(name, error)})"
