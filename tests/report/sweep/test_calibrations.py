"""The section of the page on how calibrations covered the experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from heapr.report.sweep.calibrations import coverage_section
from heapr.report.sweep.report import write_report
from heapr.report.sweep.results import JobResult
from tests.report.sweep.sweeps import config, failed, job


def covered(number: int, key: str, **coverage: Any) -> JobResult:
    full = {
        "num_tokens": 32768,
        "num_experts": 64,
        "least": 11,
        "median": 7640.5,
        "is_low": False,
        "not_reached": {},
    }
    stage = {"stage": "calibrate", "what": "", "key": key, "path": f"o/{key}", "cached": True, "seconds": 0.0}
    found = {**full, **coverage}
    return job(
        number,
        {"perplexity/wikitext2": 8.0 + number},
        config(0.1 * number + 0.1),
        coverage=found,
        stages=[stage],
    )


def test_one_row_for_each_calibration_and_a_mark_where_tokens_are_few(tmp_path: Path) -> None:
    jobs = [
        covered(0, "abc"),
        covered(1, "abc"),
        covered(2, "def", least=0, median=3.5, is_low=True, not_reached={"1": 2, "3": 1}),
        failed(3),
    ]
    section = coverage_section(jobs)
    assert (
        "<tr><th>abc</th><td>0, 1</td><td>32,768</td><td>11</td><td>7,640.5</td><td>0 of 64</td><td></td></tr>"
        in section
    )
    assert "<td>0</td><td class=failed>3.5</td><td>3 of 64</td><td>1: 2, 3: 1</td></tr>" in section
    assert "half of the experts saw too few tokens" in section
    assert "too few tokens" not in coverage_section(jobs[:2])
    page = write_report(jobs, {}, tmp_path, None)[-1].read_text()
    assert "<h2>Calibration</h2>" in page


def test_summaries_from_before_have_no_coverage() -> None:
    assert coverage_section([job(0, {}), failed(1)]) == ""
