"""The tests marked `gpu` and `kernel`: kernels and grouped products against float64, on new random inputs.

Out: how many passed, failed and were skipped.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.gpu.rows import Row
from benchmarks.gpu.shapes import Shapes

ROOT = Path(__file__).parents[2]
FILES = (
    "tests/model/test_grouped.py",
    "tests/calibration/test_kernel.py",
    "tests/calibration/test_collector.py",
    "tests/test_ragged_kernel.py",
)
OUTCOMES = ("passed", "failed", "skipped")


def measure(_: Shapes, __: torch.device) -> list[Row]:
    options = ["-q", "-p", "no:cacheprovider", "-m", "gpu or kernel"]
    command = [sys.executable, "-m", "pytest", *options, *FILES]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    print(finished.stdout[-4000:], finished.stderr[-2000:], file=sys.stderr)
    return outcomes(finished.stdout)


def outcomes(report: str) -> list[Row]:
    """Pytest's last line as rows."""
    counts = dict.fromkeys(OUTCOMES, 0)
    for number, outcome in re.findall(r"(\d+) (passed|failed|skipped|error)", report):
        counts["failed" if outcome == "error" else outcome] += int(number)
    return [Row(f"tests marked gpu: {outcome}", count, "") for outcome, count in counts.items()]
