"""A table's caption: what holds for all its rows, and how to read it.

In: an entry of the layout, the groups and rows of its table. Out: text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from heapr.report.sweep import metrics
from heapr.report.sweep.averages import Group
from heapr.report.sweep.doubt import explanation
from heapr.report.sweep.factors import UNKNOWN, factor, header, show
from heapr.report.sweep.report_layout import Entry
from heapr.report.sweep.results import Jobs, finished
from heapr.report.sweep.table_parts import GAP, Cell, Row


def caption(
    entry: Entry,
    groups: Sequence[Group],
    names: Sequence[str],
    *,
    constant: Sequence[str],
    rows: Sequence[Row],
) -> str:
    """Write the caption.

    Args:
        entry: of the layout.
        groups: jobs of each row.
        names: of the metrics.
        constant: factors that are the same in all rows.
        rows: of the finished table.
    """
    jobs = [job for group in groups for job in group.jobs]
    sentences = [_in_all_rows(jobs, constant)]
    if entry.baseline:
        members = [group.jobs for group in groups]
        sentences += [_share(entry.baseline), explanation(members, names)]
    if any(len(group.jobs) > 1 for group in groups):
        averaged = header(entry.average_over or "")
        sentences.append(f"Mean ± sample standard deviation over {averaged}.")
    done = finished(jobs)
    if _have_errors(done, names):
        sentences.append("In parentheses: standard error.")
    cells = [cell for row in rows for cell in row.cells]
    sentences += _marks(cells, are_shares=bool(entry.baseline))
    if not all(row.is_ours for row in rows):
        sentences.append(f"Published numbers have protocols of their own; ours: {_protocol(done)}.")
    return " ".join(filter(None, sentences))


def _share(baseline: Mapping[str, Any]) -> str:
    return (
        "Share of increase: how far a metric is from the unpruned model's, divided by how far it is with"
        f" {_described(baseline)}."
    )


def _have_errors(jobs: Jobs, names: Sequence[str]) -> bool:
    """Return whether the harness gave a standard error of any of the metrics."""
    errors = [metrics.standard_error(job, name) for job in jobs for name in names]
    return any(error is not None for error in errors)


def _marks(cells: Sequence[Cell], *, are_shares: bool) -> list[str]:
    """Explain gaps and bold cells, if there are any."""
    sentences = []
    if any(cell.text == GAP for cell in cells):
        meaning = "no share, see the notes" if are_shares else "not measured"
        sentences.append(f"{GAP}: {meaning}.")
    if any(cell.is_best for cell in cells):
        sentences.append("Bold: the best of those with the same model and ratio.")
    return sentences


def _in_all_rows(jobs: Jobs, constant: Sequence[str]) -> str:
    known: dict[str, Any] = {}
    for name in constant:
        for job in jobs:
            value = factor(job, name)
            if value != UNKNOWN:
                known[name] = value
    return f"In all rows: {_described(known)}." if known else ""


def _described(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{header(name)} {show(name, value)}" for name, value in values.items())


def _protocol(done: Jobs) -> str:
    """Say how our numbers were measured: windows of corpora; version and shots of the harness for tasks."""
    records: dict[str, Mapping[str, Any]] = {}
    for job in done:
        assert job.summary is not None
        records |= job.summary["protocols"]["pruned"]
    texts = []
    for name, record in records.items():
        if "window" in record:
            texts.append(f"{name} in windows of {record['window']} tokens")
        elif "lm_eval" in record:
            texts.append(f"{name} with lm-eval {record['lm_eval']}, {record['num_fewshot']} shots")
    return ", ".join(texts)
