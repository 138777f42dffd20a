"""How well the calibrations of a sweep covered the experts, as a section of the page.

In: jobs. Out: HTML, one row for each calibration.
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

from heapr.report.sweep.results import Jobs, finished, stage_entries

HEADERS = (
    "calibration",
    "jobs",
    "tokens",
    "tokens per expert: least",
    "median",
    "experts not reached",
    "in layers",
)


def coverage_section(jobs: Jobs) -> str:
    """Return a table of the calibrations; nothing if no job's summary has their coverage."""
    calibrations: dict[str, Mapping[str, Any]] = {}
    numbers: dict[str, list[int]] = {}
    for job in finished(jobs):
        assert job.summary is not None
        coverage = job.summary.get("coverage")
        if coverage:
            key = stage_entries(job, "calibrate")[0]["key"]
            calibrations[key] = coverage
            numbers.setdefault(key, []).append(job.number)
    if not calibrations:
        return ""
    headers = [f"<th>{header}</th>" for header in HEADERS]
    rows = [_row(key, numbers[key], coverage) for key, coverage in calibrations.items()]
    head = f"<thead><tr>{''.join(headers)}</tr></thead>"
    table = f"<div class=scroll><table class=plain>{head}<tbody>{''.join(rows)}</tbody></table></div>"
    is_low = any(coverage["is_low"] for coverage in calibrations.values())
    note = "<p class=failed>Where marked, half of the experts saw too few tokens for reliable scores.</p>"
    return f"<h2>Calibration</h2>\n{table}\n{note if is_low else ''}\n"


def _row(key: str, jobs: list[int], coverage: Mapping[str, Any]) -> str:
    not_reached = coverage["not_reached"]
    missed = sum(not_reached.values())
    layers = ", ".join(f"{layer}: {number}" for layer, number in not_reached.items())
    mark = " class=failed" if coverage["is_low"] else ""
    cells = [
        f"<td>{', '.join(map(str, jobs))}</td>",
        f"<td>{coverage['num_tokens']:,}</td>",
        f"<td>{coverage['least']:,}</td>",
        f"<td{mark}>{coverage['median']:,g}</td>",
        f"<td>{missed} of {coverage['num_experts']:,}</td>",
        f"<td>{html.escape(layers)}</td>",
    ]
    return f"<tr><th>{html.escape(key)}</th>{''.join(cells)}</tr>"
