"""A table's caption: what holds for all its rows, and how to read it.

In: an entry of the layout, the groups and rows of its table. Out: text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from heapr.report.sweep import metrics
from heapr.report.sweep.doubt import explanation
from heapr.report.sweep.factors import UNKNOWN, factor, header, show
from heapr.report.sweep.report_layout import Entry
from heapr.report.sweep.results import JobResult, finished

if TYPE_CHECKING:
    from heapr.report.sweep.table import Group, Row

GAP = "—"


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
    done = finished(jobs)
    cells = [cell for row in rows for cell in row.cells]
    parts = [_in_all_rows(jobs, constant)]
    if entry.baseline:
        parts.append(
            "Share of increase: how far a metric is from the unpruned model's, divided by how far it is with"
            f" {_described(entry.baseline)}."
        )
        parts.append(explanation([group.jobs for group in groups], names))
    if any(len(group.jobs) > 1 for group in groups):
        parts.append(f"Mean ± sample standard deviation over {header(entry.average_over or '')}.")
    errors = [metrics.standard_error(job, name) for job in done for name in names]
    if any(error is not None for error in errors):
        parts.append("In parentheses: standard error.")
    if any(cell.text == GAP for cell in cells):
        meaning = "no share, see the notes" if entry.baseline else "not measured"
        parts.append(f"{GAP}: {meaning}.")
    if any(cell.is_best for cell in cells):
        parts.append("Bold: the best of those with the same model and ratio.")
    if not all(row.is_ours for row in rows):
        parts.append(f"Published numbers have protocols of their own; ours: {_protocol(done)}.")
    return " ".join(filter(None, parts))


def _in_all_rows(jobs: Sequence[JobResult], constant: Sequence[str]) -> str:
    known: dict[str, Any] = {}
    for name in constant:
        for job in jobs:
            value = factor(job, name)
            if value != UNKNOWN:
                known[name] = value
    return f"In all rows: {_described(known)}." if known else ""


def _described(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{header(name)} {show(name, value)}" for name, value in values.items())


def _protocol(done: Sequence[JobResult]) -> str:
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
