"""Tables and figures of a sweep.

In: its jobs. Out: files in its folder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from heapr.report.results import JobResult


def write_report(jobs: Sequence[JobResult], layout: Mapping[str, Any], folder: Path, published: Path | None) -> list[Path]:
    """One line for every job, those that failed too."""
    lines = [f"| {job.number} | {' '.join(job.overrides)} | {'—' if job.summary is None else 'finished'} |" for job in jobs]
    (folder / "table.md").write_text("\n".join(["| job | overrides | |", "|---|---|---|", *lines, ""]), encoding="utf-8")
    (folder / "report.html").write_text("<pre>" + "\n".join(lines) + "</pre>\n", encoding="utf-8")
    return [folder / "table.md", folder / "report.html"]
