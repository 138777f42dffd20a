"""The section of the page on the models' super experts."""

from __future__ import annotations

import json
from pathlib import Path

from heapr.report.sweep.results import JobResult
from heapr.report.sweep.super_expert_table import super_experts_section
from tests.report.sweep.sweeps import config, failed, job

Found = tuple[int, int, float]  # layer, expert, times the median


def planned(number: int, folder: Path, *found: Found, protects: bool = False, name: str = "m") -> JobResult:
    """A job whose plan's report names super experts."""
    folder.mkdir()
    fields = ("layer", "expert", "times_median")
    report = {"super_experts": [dict(zip(fields, each, strict=True)) for each in found]}
    (folder / "allocation.json").write_text(json.dumps(report))
    stage = {"stage": "prune", "what": "", "key": folder.name, "path": str(folder), "cached": True}
    settings = config(0.1 * number + 0.1)
    settings["pruning"]["protect_super_experts"] = protects
    settings["model"] = {"name": name, "path": "p", "dtype": "bfloat16"}
    return job(number, {}, settings, stages=[stage | {"seconds": 0.0}])


def test_one_row_for_each_model(tmp_path: Path) -> None:
    """With a line for each expert, and the range over calibrations; a streamed model's job has found none."""
    jobs = [
        planned(0, tmp_path / "a", (3, 1, 1000.0), (2, 7, 12.345)),
        planned(1, tmp_path / "b", (3, 1, 250.0)),
        planned(2, tmp_path / "c", (3, 1, 250.0), protects=True),
        planned(3, tmp_path / "d", (0, 5, 3.0), name="<n>"),
        planned(4, tmp_path / "e"),
        failed(5),
    ]
    section = super_experts_section(jobs)
    assert (
        "<tr><th>m</th><td>3<br>2</td><td>1<br>7</td><td>250 to 1,000<br>12.3</td>"
        "<td>2 of 2<br>1 of 2</td><td>no</td></tr>" in section
    )
    assert "<tr><th>m</th><td>3</td><td>1</td><td>250</td><td>1 of 1</td><td>yes</td></tr>" in section
    assert "<tr><th>&lt;n&gt;</th><td>0</td><td>5</td><td>3</td><td>1 of 1</td><td>no</td></tr>" in section
    assert section.count("<tr>") == 4


def test_nothing_without_plans_or_in_reports_from_before(tmp_path: Path) -> None:
    before = planned(0, tmp_path / "a")
    (tmp_path / "a" / "allocation.json").write_text('{"summary": []}')
    gone = planned(1, tmp_path / "b", (0, 5, 3.0))
    (tmp_path / "b" / "allocation.json").unlink()
    assert super_experts_section([before, gone, job(2, {}), failed(3)]) == ""
