"""A table of a sweep: the unpruned model, then our numbers, each with published numbers and differences.

In: jobs, an entry of the layout, published numbers. Out: a `Table` of finished text, which
`heapr.report.sweep.render` writes.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from heapr.errors import ConfigError
from heapr.report.sweep import metrics
from heapr.report.sweep.caption import GAP, caption
from heapr.report.sweep.doubt import MARK, is_doubtful
from heapr.report.sweep.factors import (
    PATHS,
    RESULTLESS,
    by_values,
    describe,
    differing,
    factor,
    header,
    in_order,
    selected,
    show,
    varying,
)
from heapr.report.sweep.published_results import Number, find, protocol_note
from heapr.report.sweep.report_layout import Entry
from heapr.report.sweep.results import JobResult, finished

UNPRUNED, PUBLISHED, DIFFERENCE = "unpruned", "published", "difference"
NOT_MEASURED = "not measured"  # a remark, and the text of a cell whose only remark it is
Remarks = Mapping[tuple[int, str], str]  # by the job's number and the metric's name


@dataclass(frozen=True)
class Cell:
    """Text, the numbers of its notes, and whether it is the best of its group."""

    text: str = ""
    notes: tuple[int, ...] = ()
    is_best: bool = False


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        labels: cells before the metrics.
        cells: one per metric.
        is_ours: whether its numbers were measured here.
        starts_group: whether to draw a rule above it.
    """

    labels: tuple[Cell, ...]
    cells: tuple[Cell, ...]
    is_ours: bool
    starts_group: bool = False


@dataclass(frozen=True)
class Table:
    """A finished table.

    Attributes:
        title: above it.
        caption: what holds for all rows, and how to read it.
        columns: headers of the labels, then of the metrics.
        rows: in order.
        notes: numbered from 1.
    """

    title: str
    caption: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]


class Notes:
    """Footnotes, each text once, numbered in order of appearance."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def number(self, text: str) -> int:
        if text not in self.texts:
            self.texts.append(text)
        return self.texts.index(text) + 1


@dataclass(frozen=True)
class Group:
    """The jobs behind one row: a single job, or all that are averaged."""

    jobs: tuple[JobResult, ...]

    @property
    def done(self) -> list[JobResult]:
        return finished(self.jobs)

    @property
    def first(self) -> JobResult:
        return (self.done or self.jobs)[0]

    def values(self, metric: str) -> list[float]:
        found = [metrics.value(job, metric) for job in self.done]
        return [number for number in found if number is not None]

    def mean(self, metric: str) -> float | None:
        values = self.values(metric)
        return statistics.fmean(values) if values else None


def build_table(
    entry: Entry, jobs: Sequence[JobResult], published: Sequence[Number], remarks: Remarks | None = None
) -> Table:
    """Build the table of an entry, with a row for every job or average, whether it succeeded or not.

    Args:
        entry: of the layout.
        jobs: of the sweep; the entry's `where` selects among them.
        published: numbers to put beside ours.
        remarks: why shares are missing.

    Raises:
        ConfigError: jobs that would be averaged differ in more than the factor that is averaged over.
    """
    chosen = selected(jobs, entry.where)
    return _Builder(entry, chosen, published, remarks or {}).build()


class _Builder:
    def __init__(
        self, entry: Entry, jobs: Sequence[JobResult], published: Sequence[Number], remarks: Remarks
    ) -> None:
        self.entry, self.jobs, self.published, self.remarks = entry, jobs, published, remarks
        self.names = entry.metrics or tuple(metrics.known(jobs))
        identifying = [name for name in entry.rows if name != entry.average_over]
        shown = (
            varying(jobs, identifying)
            or [name for name in identifying if name in {"ratio", "criterion"}]
            or identifying[:1]
        )
        self.shown = [name for name in identifying if name in shown]
        self.constant = [name for name in identifying if name not in shown]
        self.groups = grouped(jobs, identifying, entry.average_over)
        labels = by_values([group.first for group in self.groups], identifying)
        self.is_numbered = len(labels) < len(self.groups)
        self.notes = Notes()

    def build(self) -> Table:
        rows: list[Row] = []
        models = dict.fromkeys(factor(job, "model") for job in self.jobs)
        for model in models:
            groups = [group for group in self.groups if factor(group.first, "model") == model]
            rows += self._model_rows(groups)
        columns = ["job"] if self.is_numbered else []
        columns += map(header, self.shown)
        columns += map(metrics.column_label, self.names)
        text = caption(self.entry, self.groups, self.names, constant=self.constant, rows=rows)
        return Table(self.entry.title, text, tuple(columns), tuple(rows), tuple(self.notes.texts))

    def _model_rows(self, groups: Sequence[Group]) -> list[Row]:
        """Build all rows of one model.

        There is a rule between ratios, unless every ratio has a single row.
        """
        done = [job for group in groups for job in group.done]
        rows = self._dense_rows(done)
        ratios = sorted({factor(group.first, "ratio") for group in groups}, key=in_order)
        by_ratio = []
        for ratio in ratios:
            members = [group for group in groups if factor(group.first, "ratio") == ratio]
            by_ratio.append(self._ratio_rows(members))
        are_single = all(len(members) == 1 for members in by_ratio)
        for number, of_ratio in enumerate(by_ratio):
            has_rule = number == 0 or not are_single
            rows += _with_rule(of_ratio) if has_rule else of_ratio
        return rows

    def _dense_rows(self, jobs: Sequence[JobResult]) -> list[Row]:
        """Build the unpruned model's row, if any of its metrics was measured.

        There are several rows if jobs of one model disagree about the unpruned one.
        """
        if self.entry.baseline:
            # The unpruned model's shares are zero.
            return []
        rows: list[Row] = []
        seen: list[list[float | None]] = []
        for job in jobs:
            numbers = [metrics.value(job, name, dense=True) for name in self.names]
            if numbers in seen:
                continue
            seen.append(numbers)
            cells = []
            for name, number in zip(self.names, numbers, strict=True):
                text = _dense_text(job, name, number)
                cells.append(Cell(text))
            labels = [show(name, factor(job, name)) if name == "model" else "" for name in self.shown]
            kind = UNPRUNED if len(seen) == 1 else f"{UNPRUNED} (job {job.number})"
            row = Row(self._labels(labels, kind, job), tuple(cells), is_ours=True)
            rows += [row, *self._published_rows(job, numbers, dense=True)]
        texts = {cell.text for row in rows for cell in row.cells}
        return _with_rule(rows) if texts - {"", GAP} else []

    def _ratio_rows(self, groups: Sequence[Group]) -> list[Row]:
        """Build all rows of one model and ratio, with the best value of each metric marked."""
        texts = {id(group): [self._text(group, name) for name in self.names] for group in groups}
        best = {name: self._best(groups, name) for name in self.names}
        rows: list[Row] = []
        for group in groups:
            failures = self._failures(group)
            cells = []
            for name, text in zip(self.names, texts[id(group)], strict=True):
                is_best = any(group is winner for winner in best[name])
                notes = failures + self._remarks(group, name, text)
                cells.append(Cell(text, notes, is_best))
            labels = [show(name, factor(group.first, name)) for name in self.shown]
            marks = () if group.done else failures
            rows.append(Row(self._labels(labels, "", group.first, marks), tuple(cells), is_ours=True))
            means = [group.mean(name) for name in self.names]
            rows += self._published_rows(group.first, means, dense=False)
        return rows

    def _text(self, group: Group, name: str) -> str:
        values = group.values(name)
        if not values:
            return NOT_MEASURED if self._is_not_measured(group, name) else GAP
        if len(group.jobs) == 1:
            text = _with_error(name, values[0], metrics.standard_error(group.done[0], name))
        else:
            text = metrics.text(name, statistics.fmean(values))
            if len(values) > 1:
                text += f" ± {metrics.text(name, statistics.stdev(values))}"
        return f"{text}{MARK}" if is_doubtful(group.jobs, name) else text

    def _is_not_measured(self, group: Group, name: str) -> bool:
        found = [self.remarks.get((job.number, name)) for job in group.done]
        return set(found) == {NOT_MEASURED}

    def _failures(self, group: Group) -> tuple[int, ...]:
        """Return the notes that name a row's failed jobs and say why they failed."""
        return tuple(self.notes.number(failure(job)) for job in group.jobs if job.summary is None)

    def _remarks(self, group: Group, name: str, text: str) -> tuple[int, ...]:
        """Return the notes that say why shares are missing, where the text of the cell does not."""
        if text == NOT_MEASURED:
            return ()
        notes = []
        for job in group.jobs:
            remark = self.remarks.get((job.number, name))
            if remark == NOT_MEASURED:
                remark = f"Not measured in job {job.number}."
            if remark is not None:
                notes.append(self.notes.number(remark))
        return tuple(dict.fromkeys(notes))

    def _best(self, groups: Sequence[Group], name: str) -> list[Group]:
        """Return the groups that print the best value, or no group if all print the same.

        Doubtful shares do not take part.
        """
        direction = metrics.better(name)
        means: list[tuple[float, Group]] = []
        for group in groups:
            mean = group.mean(name)
            if mean is not None and not is_doubtful(group.jobs, name):
                means.append((mean, group))
        if direction == 0 or not means:
            return []
        winner = max(direction * mean for mean, _ in means)
        printed = metrics.text(name, direction * winner)
        best = [group for mean, group in means if metrics.text(name, mean) == printed]
        return best if len(best) < len(means) else []

    def _published_rows(self, job: JobResult, ours: Sequence[float | None], *, dense: bool) -> list[Row]:
        """Build a row of published numbers and a row of differences; none without a published number."""
        found = [find(self.published, job, name, dense=dense) for name in self.names]
        sources = dict.fromkeys(number.source for number in found if number is not None)
        if not sources:
            return []
        marks = {source: self.notes.number(protocol_note(source)) for source in sources}
        values, differences = [], []
        for name, number, mine in zip(self.names, found, ours, strict=True):
            value = difference = Cell()
            if number is not None:
                notes = (marks[number.source],) if len(sources) > 1 else ()
                value = Cell(metrics.text(name, number.value), notes)
            if number is not None and mine is not None:
                difference = Cell(metrics.signed(name, mine - number.value, mine))
            values.append(value)
            differences.append(difference)
        row_notes = tuple(marks.values()) if len(sources) == 1 else ()
        blank = [""] * len(self.shown)
        return [
            Row(self._labels(blank, PUBLISHED, None, row_notes), tuple(values), is_ours=False),
            Row(self._labels(blank, DIFFERENCE, None), tuple(differences), is_ours=False),
        ]

    def _labels(
        self, labels: Sequence[str], kind: str, job: JobResult | None, notes: tuple[int, ...] = ()
    ) -> tuple[Cell, ...]:
        """Return the cells before the metrics: the job's number where rows need one, and the factors.

        The kind of a row joins its first factor other than the model.
        """
        cells = [Cell(text) for text in labels]
        place = next((place for place, name in enumerate(self.shown) if name != "model"), 0)
        texts = filter(None, (labels[place], kind))
        cells[place] = Cell(", ".join(texts), notes)
        if not self.is_numbered:
            return tuple(cells)
        number = "" if job is None or kind.startswith(UNPRUNED) else str(job.number)
        return (Cell(number), *cells)


def grouped(jobs: Sequence[JobResult], identifying: Sequence[str], average_over: str | None) -> list[Group]:
    """Group the jobs that are averaged together; without an average, every job is a group.

    Args:
        jobs: to group.
        identifying: factors that are equal within a group.
        average_over: factor whose values are averaged.

    Raises:
        ConfigError: jobs of a group differ in more than the factor that is averaged over.
    """
    if average_over is None:
        return [Group((job,)) for job in jobs]
    groups = by_values(jobs, identifying).values()
    for members in groups:
        _check_alike(members, average_over)
    return [Group(tuple(members)) for members in groups]


def failure(job: JobResult) -> str:
    """Say in one line which job failed, and why."""
    what = " ".join(job.overrides) or describe(job, ["model", "criterion", "ratio"])
    reason = (job.error or "no reason known").strip().splitlines()[0]
    return f"Job {job.number} failed ({what}): {reason}"


def _check_alike(jobs: Sequence[JobResult], average_over: str) -> None:
    """Refuse an average over jobs that differ in anything else that changes a result."""
    last = average_over.rpartition(".")[2]
    for path in differing(jobs):
        is_averaged = path.endswith(f".{last}") or PATHS.get(last) == path
        if path.split(".")[0] not in RESULTLESS and not is_averaged:
            numbers = ", ".join(str(job.number) for job in jobs)
            raise ConfigError(
                f"jobs {numbers} would be averaged over {average_over}, but differ in {path}; add it to rows"
                " or series"
            )


def _with_rule(rows: Sequence[Row]) -> list[Row]:
    """Return the rows with a rule above the first."""
    first, *others = rows
    return [replace(first, starts_group=True), *others]


def _dense_text(job: JobResult, name: str, number: float | None) -> str:
    if number is None:
        return "" if name.partition("/")[0] in metrics.OF_A_PAIR else GAP
    return _with_error(name, number, metrics.standard_error(job, name, dense=True))


def _with_error(name: str, number: float, error: float | None) -> str:
    text = metrics.text(name, number)
    return text if error is None else f"{text} ({metrics.text(name, error)})"
