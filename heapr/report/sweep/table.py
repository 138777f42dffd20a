"""A table of a sweep: the unpruned model, then our numbers, each with published numbers and differences.

In: jobs, an entry of the layout, published numbers. Out: a `Table` of finished text, which
`heapr.report.sweep.render` writes.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from heapr.report.sweep import metrics
from heapr.report.sweep.averages import Group, grouped
from heapr.report.sweep.caption import caption
from heapr.report.sweep.doubt import MARK, is_doubtful
from heapr.report.sweep.factors import by_values, factor, failure, header, in_order, selected, show, varying
from heapr.report.sweep.published_results import Number, Numbers, find, protocol_note
from heapr.report.sweep.report_layout import Entry
from heapr.report.sweep.results import JobResult, Jobs
from heapr.report.sweep.shares import Remarks
from heapr.report.sweep.table_cells import (
    best_places,
    dense_text,
    difference_cells,
    measured_text,
    published_cells,
)
from heapr.report.sweep.table_parts import GAP, NOT_MEASURED, Cell, Cells, Marks, Notes, Row, Table

Measured = Sequence[float | None]  # by metric, in the order of the columns

USUAL = ("ratio", "criterion")  # factors that have a column even if they are the same in all rows
UNPRUNED, PUBLISHED, DIFFERENCE = "unpruned", "published", "difference"


def build_table(entry: Entry, jobs: Jobs, published: Numbers, remarks: Remarks | None = None) -> Table:
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
    """Builds one table, row by row.

    Attributes:
        entry: of the layout.
        jobs: those in the table.
        published: numbers to put beside ours.
        remarks: why shares are missing.
        notes: footnotes so far; they are numbered in the order in which rows are built.
        names: of the metrics, one per column.
        shown: factors that have a column of their own.
        constant: other factors, which go into the caption.
        groups: jobs of each row.
        is_numbered: whether rows need their job's number, because factors do not tell them apart.
    """

    def __init__(self, entry: Entry, jobs: Jobs, published: Numbers, remarks: Remarks) -> None:
        self.entry = entry
        self.jobs = jobs
        self.published = published
        self.remarks = remarks
        self.notes = Notes()
        self.names = entry.metrics or tuple(metrics.known(jobs))
        identifying = [name for name in entry.rows if name != entry.average_over]
        self.shown = _shown(jobs, identifying)
        self.constant = [name for name in identifying if name not in self.shown]
        self.groups = grouped(jobs, identifying, entry.average_over)
        firsts = [group.first for group in self.groups]
        labels = by_values(firsts, identifying)
        self.is_numbered = len(labels) < len(self.groups)

    def build(self) -> Table:
        """Build all rows, then the caption, which explains what occurs in them."""
        rows: list[Row] = []
        for of_model in _by_factor(self.groups, "model").values():
            rows += self._model_rows(of_model)
        factors = map(header, self.shown)
        labels = map(metrics.column_label, self.names)
        columns = (*factors, *labels)
        if self.is_numbered:
            columns = ("job", *columns)
        text = caption(self.entry, self.groups, self.names, constant=self.constant, rows=rows)
        notes = tuple(self.notes.texts)
        return Table(self.entry.title, text, columns, tuple(rows), notes)

    def _model_rows(self, groups: Sequence[Group]) -> list[Row]:
        """Build all rows of one model: the unpruned one, then ratio after ratio."""
        done = [job for group in groups for job in group.done]
        dense_rows = self._dense_rows(done)
        groups_by_ratio = _by_factor(groups, "ratio")
        rows_by_ratio = []
        for ratio in sorted(groups_by_ratio, key=in_order):
            rows = self._ratio_rows(groups_by_ratio[ratio])
            rows_by_ratio.append(rows)
        return dense_rows + _with_rules(rows_by_ratio)

    def _dense_rows(self, jobs: Jobs) -> list[Row]:
        """Build the unpruned model's row, if any of its metrics was measured.

        There are several rows if jobs of one model disagree about the unpruned one.
        """
        if self.entry.baseline:
            # The unpruned model's shares are zero.
            return []
        rows: list[Row] = []
        seen: list[Measured] = []
        for job in jobs:
            numbers = [metrics.value(job, name, dense=True) for name in self.names]
            if numbers in seen:
                continue
            ours = self._dense_row(job, numbers, is_first=not seen)
            beside = self._published_rows(job, numbers, dense=True)
            rows += [ours, *beside]
            seen.append(numbers)
        texts = {cell.text for row in rows for cell in row.cells}
        numbers_in_text = texts - {"", GAP}
        return _with_rule(rows) if numbers_in_text else []

    def _dense_row(self, job: JobResult, numbers: Measured, *, is_first: bool) -> Row:
        """Build a row of the unpruned model, which names the job unless it is the first of its model."""
        cells = []
        for name, number in zip(self.names, numbers, strict=True):
            text = dense_text(job, name, number)
            cells.append(Cell(text))
        model = show("model", factor(job, "model"))
        factors = [model if name == "model" else "" for name in self.shown]
        kind = UNPRUNED if is_first else f"{UNPRUNED} (job {job.number})"
        labels = self._labels(factors, kind)
        return Row(labels, tuple(cells), is_ours=True)

    def _ratio_rows(self, groups: Sequence[Group]) -> list[Row]:
        """Build all rows of one model and ratio, with the best value of each metric marked."""
        best = {name: best_places(groups, name) for name in self.names}
        rows: list[Row] = []
        for place, group in enumerate(groups):
            best_names = {name for name, places in best.items() if place in places}
            ours = self._measured_row(group, best_names)
            means = [group.mean(name) for name in self.names]
            beside = self._published_rows(group.first, means, dense=False)
            rows += [ours, *beside]
        return rows

    def _measured_row(self, group: Group, best_names: Collection[str]) -> Row:
        """Build the row of a group, with bold cells for the metrics in which it is the best."""
        failures = self._failures(group)
        cells = []
        for name in self.names:
            text = self._text(group, name)
            remarks = self._remarks(group, name, text)
            cell = Cell(text, failures + remarks, is_best=name in best_names)
            cells.append(cell)
        factors = [show(name, factor(group.first, name)) for name in self.shown]
        marks = () if group.done else failures
        number = str(group.first.number)
        labels = self._labels(factors, number=number, notes=marks)
        return Row(labels, tuple(cells), is_ours=True)

    def _text(self, group: Group, name: str) -> str:
        """Return the text of a cell, with a mark if its share may be chance."""
        if not group.values(name):
            return NOT_MEASURED if self._is_not_measured(group, name) else GAP
        text = measured_text(group, name)
        return f"{text}{MARK}" if is_doubtful(group.jobs, name) else text

    def _is_not_measured(self, group: Group, name: str) -> bool:
        """Return whether all that the remarks say of a gap is that there was no measurement."""
        found = {self.remarks.get((job.number, name)) for job in group.done}
        return found == {NOT_MEASURED}

    def _failures(self, group: Group) -> Marks:
        """Return the notes that name a row's failed jobs and say why they failed."""
        numbers = []
        for job in group.jobs:
            if job.summary is None:
                note = failure(job)
                numbers.append(self.notes.number(note))
        return tuple(numbers)

    def _remarks(self, group: Group, name: str, text: str) -> Marks:
        """Return the notes that say why shares are missing, where the text of the cell does not."""
        if text == NOT_MEASURED:
            return ()
        notes: dict[int, None] = {}
        for job in group.jobs:
            remark = self.remarks.get((job.number, name))
            if remark == NOT_MEASURED:
                remark = f"Not measured in job {job.number}."
            if remark is not None:
                number = self.notes.number(remark)
                notes[number] = None
        return tuple(notes)

    def _published_rows(self, job: JobResult, ours: Measured, *, dense: bool) -> list[Row]:
        """Build a row of published numbers and a row of differences; none without a published number.

        A single source is a note of the row. Of several, each is a note of its cells.
        """
        found = [find(self.published, job, name, dense=dense) for name in self.names]
        marks = self._source_marks(found)
        if not marks:
            return []
        row_mark, *others = marks.values()
        cell_marks = marks if others else {}
        values = published_cells(self.names, found, cell_marks)
        differences = difference_cells(self.names, found, ours)
        return [
            self._row_beside(PUBLISHED, values, () if others else row_mark),
            self._row_beside(DIFFERENCE, differences),
        ]

    def _source_marks(self, numbers: Sequence[Number | None]) -> dict[str, Marks]:
        """Return the note that says how each source measured its numbers, by source."""
        marks: dict[str, Marks] = {}
        for number in numbers:
            if number is not None and number.source not in marks:
                note = protocol_note(number.source)
                marks[number.source] = (self.notes.number(note),)
        return marks

    def _row_beside(self, kind: str, cells: Sequence[Cell], notes: Marks = ()) -> Row:
        """Return a row below one of ours: it repeats no factor and no job."""
        blank = [""] * len(self.shown)
        labels = self._labels(blank, kind, notes=notes)
        return Row(labels, tuple(cells), is_ours=False)

    def _labels(
        self, factors: Sequence[str], kind: str = "", *, number: str = "", notes: Marks = ()
    ) -> Cells:
        """Return the cells before the metrics.

        Args:
            factors: of the row, as text.
            kind: of a row that is not one of ours; it joins the first factor other than the model.
            number: of the job, for tables whose rows need it.
            notes: beside the kind or that factor.
        """
        cells = [Cell(text) for text in factors]
        others = [place for place, name in enumerate(self.shown) if name != "model"]
        place = others[0] if others else 0
        texts = filter(None, (factors[place], kind))
        text = ", ".join(texts)
        cells[place] = Cell(text, notes)
        return (Cell(number), *cells) if self.is_numbered else tuple(cells)


def _shown(jobs: Jobs, identifying: Sequence[str]) -> list[str]:
    """Return the factors that get a column: those that vary, else ratio and criterion, else the first."""
    found = varying(jobs, identifying)
    if found:
        return found
    usual = [name for name in identifying if name in USUAL]
    return usual or list(identifying[:1])


def _by_factor(groups: Sequence[Group], name: str) -> dict[Any, list[Group]]:
    """Return the groups by the value of a factor, in order of appearance."""
    by_value: dict[Any, list[Group]] = {}
    for group in groups:
        value = factor(group.first, name)
        by_value.setdefault(value, []).append(group)
    return by_value


def _with_rules(rows_by_ratio: Sequence[list[Row]]) -> list[Row]:
    """Join the rows of all ratios, with rules between them unless every ratio has a single row.

    There is always a rule above the first.
    """
    are_single = all(len(rows) == 1 for rows in rows_by_ratio)
    joined: list[Row] = []
    for rows in rows_by_ratio:
        has_rule = not joined or not are_single
        joined += _with_rule(rows) if has_rule else rows
    return joined


def _with_rule(rows: Sequence[Row]) -> list[Row]:
    """Return the rows with a rule above the first."""
    first, *others = rows
    return [replace(first, starts_group=True), *others]
