"""`make gpu` with toy shapes: every part runs, every figure was predicted, and a part that fails costs no other."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu.marked import outcomes
from benchmarks.gpu.ragged import plans, saved_factor
from benchmarks.gpu.rows import Row, predictions, table
from benchmarks.gpu.shapes import TOY, Shapes

QUICK = [
    part for part in command.PARTS if part not in {"marked", "scores"}
]  # tests within a test; trained models


@pytest.mark.parametrize("part", QUICK)
def test_every_part_runs_and_was_predicted(part: str) -> None:
    rows = importlib.import_module(f"benchmarks.gpu.{part}").measure(TOY, torch.device("cpu"))
    assert rows and all(row.name in predictions() for row in rows), [row.name for row in rows]
    assert all(row.value >= 0 for row in rows)
    assert len(table(rows).splitlines()) == len(rows) + 1


def run_command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["gpu", "--toy", *arguments])
    return command.main()


def test_a_part_hands_its_rows_over_and_without_a_gpu_no_file_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command._command("streamed", toy=True)[1:] == [
        "-m", "benchmarks.gpu", "--in-process", "--parts", "streamed", "--toy",
    ]  # fmt: skip
    assert run_command(monkeypatch, "--in-process", "--parts", "streamed") == 0
    last = capsys.readouterr().out.splitlines()[-1]
    monkeypatch.setattr(command, "_command", lambda part, toy: [sys.executable, "-c", f"print({last!r})"])
    assert run_command(monkeypatch, "--parts", "streamed,repair", "--results", str(tmp_path)) == 0
    assert "streamed: spans / one pass, seconds" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_part_that_fails_or_takes_too_long_says_so() -> None:
    printed = f"print('{command.ROWS}' + '[]', flush=True)"
    failed = command.run_part([sys.executable, "-c", f"{printed}; raise SystemExit(3)"], limit=60)
    assert failed["outcome"] == "failed with code 3" and failed["rows"] == []
    late = command.run_part([sys.executable, "-c", f"{printed}; import time; time.sleep(60)"], limit=1)
    assert late["outcome"] == "stopped after 1 s" and late["seconds"] < 30


def test_packages_come_from_a_folder_of_wheels(tmp_path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "missing_here-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("missing_here.py", "ROWS = '[1]'")
    code = f"import missing_here; print('{command.ROWS}' + missing_here.ROWS)"
    assert command.run_part([sys.executable, "-c", code], limit=60, wheels=tmp_path)["rows"] == [1]


def test_results_are_named_by_the_card(tmp_path: Path) -> None:
    found = {"ragged": {"outcome": "done", "seconds": 1.0, "rows": [Row("a", 1.0, "s").as_dict()]}}
    command._write(tmp_path, "NVIDIA H100 80GB HBM3", found)
    written = json.loads((tmp_path / "gpu_nvidia_h100_80gb_hbm3.json").read_text())
    assert written["card"] == "NVIDIA H100 80GB HBM3" and written["parts"] == found


def test_the_limits_add_up_to_eight_minutes() -> None:
    assert sum(command.PARTS.values()) <= 8 * 60


def test_outcomes_of_tests_are_counted() -> None:
    rows = outcomes("collected\n==== 1 failed, 12 passed, 3 skipped, 2 errors in 1.2s ====")
    assert {row.name.rpartition(" ")[2]: row.value for row in rows} == {
        "passed": 12,
        "failed": 3,
        "skipped": 3,
    }


def test_widths_are_those_of_the_ratio_and_savings_are_counted_by_pairs() -> None:
    for ratio, widths in plans(Shapes()).items():
        assert len(widths) == 128 and sum(widths) / (128 * 768) == pytest.approx(1 - float(ratio), abs=0.01)
    expert_TK = torch.tensor([[0, 1], [0, 2]])
    assert saved_factor([4, 8, 8], 8, expert_TK, "prefill") == 8 * 4 / (4 * 2 + 8 + 8)
    assert saved_factor([4, 8, 8], 8, expert_TK, "decode") == 8 * 3 / (4 + 8 + 8)
