"""A table of a sweep: the unpruned model first, ours, the published number beside it and the difference.

In: jobs, an entry of the layout, published numbers. Out: a `Table` of finished text, which
`heapr.report.sweep.render` writes.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from heapr.errors import ConfigError
from heapr.report.sweep import metrics
from heapr.report.sweep.doubt import MARK, explanation, is_doubtful
from heapr.report.sweep.factors import (
    PATHS,
    RESULTLESS,
    UNKNOWN,
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

GAP = "—"
UNPRUNED, PUBLISHED, DIFFERENCE = "unpruned", "published", "difference"
NOT_MEASURED = "not measured"  # a remark, and what a cell says that has no other
Remarks = Mapping[tuple[int, str], str]  # by the job's number and the metric's name


@dataclass(frozen=True)
class Cell:
    """Text, numbers of its notes, and whether it is the best of its group."""

    text: str = ""
    notes: tuple[int, ...] = ()
    is_best: bool = False


@dataclass(frozen=True)
class Row:
    """Labels, then one cell per metric. `starts_group` asks for a rule above; `is_ours` for what was measured
    here."""

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
    """Jobs whose results are one row: one, or those that are averaged."""

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


def build_table(
    entry: Entry, jobs: Sequence[JobResult], published: Sequence[Number], remarks: Remarks | None = None
) -> Table:
    """The table of an entry; a row for every job or average, whether it succeeded or not.

    Args:
        remarks: why shares are missing.
    """
    return _Builder(entry, selected(jobs, entry.where), published, remarks or {}).build()


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
        self.constant = [name for name in identifying if name not in shown]
        self.groups = grouped(jobs, identifying, entry.average_over)
        self.shown = [name for name in identifying if name in shown]
        self.is_numbered = len(
            {tuple(str(factor(g.first, name)) for name in identifying) for g in self.groups}
        ) < len(self.groups)
        self.notes = Notes()

    def build(self) -> Table:
        rows: list[Row] = []
        for model in dict.fromkeys(factor(job, "model") for job in self.jobs):
            of_model = [group for group in self.groups if factor(group.first, "model") == model]
            rows += self._dense_rows([job for group in of_model for job in group.done])
            ratios = sorted({factor(group.first, "ratio") for group in of_model}, key=in_order)
            by_ratio = [
                self._ratio_rows([group for group in of_model if factor(group.first, "ratio") == ratio])
                for ratio in ratios
            ]
            are_single = all(len(members) == 1 for members in by_ratio)
            for number, members in enumerate(by_ratio):
                rows += [
                    replace(row, starts_group=place == 0 and not (are_single and number))
                    for place, row in enumerate(members)
                ]
        columns = [
            *(["job"] if self.is_numbered else []),
            *map(header, self.shown),
            *map(metrics.column_label, self.names),
        ]
        return Table(
            self.entry.title, self._caption(rows), tuple(columns), tuple(rows), tuple(self.notes.texts)
        )

    def _caption(self, rows: Sequence[Row]) -> str:
        parts = []
        known = {
            name: value
            for name in self.constant
            for job in self.jobs
            if (value := factor(job, name)) != UNKNOWN
        }
        if known:
            parts.append(
                "In all rows:"
                f" {', '.join(f'{header(name)} {show(name, value)}' for name, value in known.items())}."
            )
        if self.entry.baseline:
            baseline = ", ".join(
                f"{header(name)} {show(name, value)}" for name, value in self.entry.baseline.items()
            )
            parts.append(
                "Share of increase: how far a metric is from the unpruned model's, divided by how far it is"
                f" with {baseline}."
            )
            parts += filter(None, [explanation([group.jobs for group in self.groups], self.names)])
        if any(len(group.jobs) > 1 for group in self.groups):
            parts.append(f"Mean ± sample standard deviation over {header(self.entry.average_over or '')}.")
        if any(
            metrics.standard_error(job, name) is not None
            for job in finished(self.jobs)
            for name in self.names
        ):
            parts.append("In parentheses: standard error.")
        cells = [cell for row in rows for cell in row.cells]
        if any(cell.text == GAP for cell in cells):
            parts.append(
                f"{GAP} stands for what"
                f" {'there is no share of: see the notes' if self.entry.baseline else 'was not measured'}."
            )
        if any(cell.is_best for cell in cells):
            parts.append("Bold: the best of those with the same model and ratio.")
        if not all(row.is_ours for row in rows):
            parts.append(f"Published numbers have protocols of their own; ours: {self._protocol()}.")
        return " ".join(parts)

    def _protocol(self) -> str:
        """How ours were measured: windows of corpora, and the harness' version and shots of tasks."""
        records = {
            name: record
            for job in finished(self.jobs)
            if job.summary
            for name, record in job.summary["protocols"]["pruned"].items()
        }
        texts = []
        for name, record in records.items():
            if "window" in record:
                texts.append(f"{name} in windows of {record['window']} tokens")
            elif "lm_eval" in record:
                texts.append(f"{name} with lm-eval {record['lm_eval']}, {record['num_fewshot']} shots")
        return ", ".join(texts)

    def _dense_rows(self, jobs: Sequence[JobResult]) -> list[Row]:
        """One row for the unpruned model, none if nothing of it was measured; more only if jobs of one model
        disagree about it."""
        if self.entry.baseline:
            return []  # its shares are zero
        rows: list[Row] = []
        seen: list[tuple[float | None, ...]] = []
        for job in jobs:
            found = tuple(metrics.value(job, name, dense=True) for name in self.names)
            if found in seen:
                continue
            seen.append(found)
            cells = [
                Cell(self._dense_text(job, name, number))
                for name, number in zip(self.names, found, strict=True)
            ]
            labels = [show(name, factor(job, name)) if name == "model" else "" for name in self.shown]
            kind = UNPRUNED if len(seen) == 1 else f"{UNPRUNED} (job {job.number})"
            rows.append(Row(self._labels(labels, kind, job), tuple(cells), is_ours=True))
            rows += self._published_rows(job, list(found), dense=True)
        if not any(cell.text not in {"", GAP} for row in rows for cell in row.cells):
            return []
        return [replace(row, starts_group=number == 0) for number, row in enumerate(rows)]

    def _dense_text(self, job: JobResult, name: str, number: float | None) -> str:
        if number is None:
            return "" if name.partition("/")[0] in metrics.OF_A_PAIR else GAP
        return _with_error(name, number, metrics.standard_error(job, name, dense=True))

    def _ratio_rows(self, groups: Sequence[Group]) -> list[Row]:
        """All rows of one model and ratio, the best of each metric marked."""
        texts = {id(group): [self._text(group, name) for name in self.names] for group in groups}
        best = [self._best(groups, number) for number in range(len(self.names))]
        rows: list[Row] = []
        for group in groups:
            notes = self._failures(group)
            cells = []
            for number, (name, text) in enumerate(zip(self.names, texts[id(group)], strict=True)):
                is_best = any(group is winner for winner in best[number])
                cells.append(Cell(text, notes + self._remarks(group, name, text), is_best))
            labels = [show(name, factor(group.first, name)) for name in self.shown]
            marks = () if group.done else notes
            rows.append(Row(self._labels(labels, "", group.first, marks), tuple(cells), is_ours=True))
            means = [
                statistics.fmean(values) if (values := group.values(name)) else None for name in self.names
            ]
            rows += self._published_rows(group.first, means, dense=False)
        return rows

    def _text(self, group: Group, name: str) -> str:
        values = group.values(name)
        if not values:
            return NOT_MEASURED if self._is_not_measured(group, name) else GAP
        if len(group.jobs) == 1:
            text = _with_error(name, values[0], metrics.standard_error(group.done[0], name))
        else:
            mean = metrics.text(name, statistics.fmean(values))
            text = f"{mean} ± {metrics.text(name, statistics.stdev(values))}" if len(values) > 1 else mean
        return f"{text}{MARK}" if is_doubtful(group.jobs, name) else text

    def _is_not_measured(self, group: Group, name: str) -> bool:
        return bool(group.done) and all(
            self.remarks.get((job.number, name)) == NOT_MEASURED for job in group.done
        )

    def _failures(self, group: Group) -> tuple[int, ...]:
        """Notes that name the failed jobs behind a row and say why."""
        return tuple(self.notes.number(failure(job)) for job in group.jobs if job.summary is None)

    def _remarks(self, group: Group, name: str, text: str) -> tuple[int, ...]:
        """Notes that say why shares are missing, where the text of the cell does not."""
        if text == NOT_MEASURED:
            return ()
        found = {
            job.number: self.remarks[job.number, name]
            for job in group.jobs
            if (job.number, name) in self.remarks
        }
        notes = [
            f"Not measured in job {number}." if remark == NOT_MEASURED else remark
            for number, remark in found.items()
        ]
        return tuple(dict.fromkeys(map(self.notes.number, notes)))

    def _best(self, groups: Sequence[Group], number: int) -> list[Group]:
        """The groups that print the best value, of those whose value means something; none where all are
        equal."""
        name = self.names[number]
        groups = [group for group in groups if not is_doubtful(group.jobs, name)]
        direction = metrics.better(name)
        means = [(statistics.fmean(values), group) for group in groups if (values := group.values(name))]
        if direction == 0 or not means:
            return []
        winner = max(direction * mean for mean, _ in means)
        printed = metrics.text(name, direction * winner)
        best = [group for mean, group in means if metrics.text(name, mean) == printed]
        return best if len(best) < len(means) else []

    def _published_rows(self, job: JobResult, ours: Sequence[float | None], *, dense: bool) -> list[Row]:
        found = [find(self.published, job, name, dense=dense) for name in self.names]
        sources = dict.fromkeys(number.source for number in found if number is not None)
        if not sources:
            return []
        marks = {source: self.notes.number(protocol_note(source)) for source in sources}
        values, differences = [], []
        for name, number, mine in zip(self.names, found, ours, strict=True):
            notes = (marks[number.source],) if number is not None and len(sources) > 1 else ()
            values.append(
                Cell("", notes) if number is None else Cell(metrics.text(name, number.value), notes)
            )
            difference = None if number is None or mine is None else mine - number.value
            differences.append(
                Cell("" if difference is None else metrics.signed(name, difference, mine or 0.0))
            )
        row_notes = tuple(marks.values()) if len(sources) == 1 else ()
        blank = [""] * len(self.shown)
        published = Row(self._labels(blank, PUBLISHED, None, row_notes), tuple(values), is_ours=False)
        return [published, Row(self._labels(blank, DIFFERENCE, None), tuple(differences), is_ours=False)]

    def _labels(
        self, labels: Sequence[str], kind: str, job: JobResult | None, notes: tuple[int, ...] = ()
    ) -> tuple[Cell, ...]:
        """The cells before the metrics: job number where it is needed, and factors; the kind of a row stands
        where it says most."""
        number = (
            [Cell("" if job is None or kind.startswith(UNPRUNED) else str(job.number))]
            if self.is_numbered
            else []
        )
        place = next((place for place, name in enumerate(self.shown) if name != "model"), 0)
        cells = [Cell(text) for text in labels]
        cells[place] = Cell(", ".join(text for text in (labels[place], kind) if text), notes)
        return (*number, *cells)


def grouped(jobs: Sequence[JobResult], identifying: Sequence[str], average_over: str | None) -> list[Group]:
    """Jobs that are averaged together: equal in everything that identifies a row. Without an average, one
    each."""
    if average_over is None:
        return [Group((job,)) for job in jobs]
    groups: dict[tuple[str, ...], list[JobResult]] = {}
    for job in jobs:
        groups.setdefault(tuple(str(factor(job, name)) for name in identifying), []).append(job)
    for members in groups.values():
        _check_alike(members, average_over)
    return [Group(tuple(members)) for members in groups.values()]


def _check_alike(jobs: Sequence[JobResult], average_over: str) -> None:
    """Jobs that are averaged may differ in nothing else that changes a result."""
    last = average_over.rpartition(".")[2]
    for path in differing(jobs):
        if path.split(".")[0] not in RESULTLESS and not path.endswith(f".{last}") and PATHS.get(last) != path:
            numbers = ", ".join(str(job.number) for job in jobs)
            raise ConfigError(
                f"jobs {numbers} would be averaged over {average_over}, but differ in {path}; add it to rows"
                " or series"
            )


def failure(job: JobResult) -> str:
    """Which job failed, and why, in one line."""
    what = " ".join(job.overrides) or describe(job, ["model", "criterion", "ratio"])
    reason = (job.error or "no reason known").strip().splitlines()[0]
    return f"Job {job.number} failed ({what}): {reason}"


def _with_error(name: str, number: float, error: float | None) -> str:
    return (
        metrics.text(name, number)
        if error is None
        else f"{metrics.text(name, number)} ({metrics.text(name, error)})"
    )
