"""What a job of a sweep costs outside its stages: composing, checking, loading, reporting.

Run:  python benchmarks/sweep_overhead.py
Out:  for a process of its own per job, the basic launcher and, if it is installed, joblib: seconds per job
      outside the stages, also as a share of the first; and by how much a sweep's process grows per job.

Jobs prune the built-in model by different ratios. In sweeps, starting and the first jobs, which import what
later ones find, are not counted: the figure is the slope from a few jobs to all.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
OPTIONS = (
    "model=tiny",
    "calibration.num_samples=8",
    "evaluation=none",
    "tracking=none",
    "runtime.device=cpu",
)
SETTLED = 10  # jobs after which the process has all modules and buffers
MIB = 2**20


@dataclass(frozen=True)
class Sweep:
    """What was measured of some jobs in one folder.

    Attributes:
        num_jobs: that ran.
        seconds: of all, starting included.
        in_stages: seconds of their stages together.
        peaks: highest memory of the process by the end of each job, bytes.
    """

    num_jobs: int
    seconds: float
    in_stages: float
    peaks: list[int]


def run(num_jobs: int, options: Sequence[str]) -> Sweep:
    """Run jobs with different ratios, with an empty store."""
    ratios = [f"{0.2 + 0.5 * number / num_jobs:.4f}" for number in range(num_jobs)]
    with tempfile.TemporaryDirectory() as folder:
        sweep = Path(folder) / "sweep"
        command = [sys.executable, "run.py", *OPTIONS, *options, f"pruning.ratio={','.join(ratios)}"]
        command += [f"paths.outputs={folder}", f"hydra.sweep.dir={sweep}", f"hydra.run.dir={sweep}/0"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        started = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, env=environment, check=False, capture_output=True, text=True)
        seconds = time.perf_counter() - started
        assert done.returncode == 0, done.stderr
        files = sorted(sweep.glob("*/summary.json"), key=lambda file: int(file.parent.name))
        summaries = [json.loads(file.read_text()) for file in files]
    assert len(summaries) == num_jobs
    in_stages = sum(_seconds(summary) for summary in summaries)
    peaks = [max(stage["peak_memory_bytes"] for stage in summary["stages"]) for summary in summaries]
    return Sweep(num_jobs, seconds, in_stages, peaks)


def _seconds(summary: dict[str, Any]) -> float:
    seconds: float = sum(stage["seconds"] for stage in summary["stages"])
    return seconds


def slope(num_jobs: int, options: Sequence[str], *, at_once: int) -> tuple[float, Sweep]:
    """Seconds per job outside the stages, and the longer of two sweeps."""
    few, many = run(2 * at_once, options), run(num_jobs, options)
    difference = at_once * (many.seconds - few.seconds) - (many.in_stages - few.in_stages)
    return difference / (many.num_jobs - few.num_jobs), many


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=40)
    parser.add_argument("--at-once", type=int, default=2, help="processes of joblib")
    arguments = parser.parse_args()
    alone = run(1, [])
    own = alone.seconds - alone.in_stages
    print(f"a process of its own: {own:6.2f} s per job outside the stages", flush=True)
    basic, sweep = slope(arguments.jobs, ["-m"], at_once=1)
    print(f"basic launcher:       {basic:6.2f} s, {basic / own:.3f} of that", flush=True)
    if len(sweep.peaks) > SETTLED + 1:
        growth = (sweep.peaks[-1] - sweep.peaks[SETTLED]) / (len(sweep.peaks) - 1 - SETTLED)
        print(f"  its process grows by {growth / MIB:.2f} MiB per job behind the first {SETTLED}")
    if find_spec("joblib") is None or find_spec("hydra_plugins.hydra_joblib_launcher") is None:
        print("joblib:               not installed; pip install 'heapr[joblib]'")
        return
    launcher = ["-m", "hydra/launcher=joblib", f"hydra.launcher.n_jobs={arguments.at_once}"]
    warm, _ = slope(arguments.jobs, launcher, at_once=arguments.at_once)
    print(f"joblib, {arguments.at_once} processes:  {warm:6.2f} s, {warm / own:.3f} of that")


if __name__ == "__main__":
    main()
