"""A sweep through every launcher that heapr has options for: real ones on this machine, SLURM against a fake one.

Slow, and with packages that heapr does not need otherwise: `make launchers`.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.launchers import fake_slurm

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.launcher
PACKAGES = {
    "joblib": "hydra_plugins.hydra_joblib_launcher",
    "submitit_local": "hydra_plugins.hydra_submitit_launcher",
    "submitit_slurm": "hydra_plugins.hydra_submitit_launcher",
    "ray": "hydra_plugins.hydra_ray_launcher",
}
SMALL = ("calibration.num_samples=8", "evaluation=none", "tracking=none")
SIX_JOBS = (*SMALL, "pruning.ratio=0.1,0.2,0.3", "score=heapr,fisher", "experiment=ratio_curve", "model=tiny")
TWO_JOBS = (*SMALL, "pruning.ratio=0.1,0.2", "score=heapr", "experiment=ratio_curve", "model=tiny")


LIMIT = 900  # seconds for one sweep; on a busy machine, some took 150


@pytest.fixture(params=PACKAGES)
def launcher(request: pytest.FixtureRequest) -> str:
    pytest.importorskip(PACKAGES[request.param], reason="not installed; make launchers installs it")
    return str(request.param)


@pytest.fixture
def slurm() -> None:
    pytest.importorskip(PACKAGES["submitit_slurm"], reason="not installed; make launchers installs it")


class Sweep:
    """sweep.py in a process, with a SLURM of its own."""

    def __init__(self, folder: Path) -> None:
        self.outputs, self.slurm = folder / "outputs", folder / "slurm"
        fake_slurm.install(self.slurm)

    def start(self, arguments: Sequence[str], launcher: str | None) -> subprocess.Popen[str]:
        environment = os.environ | {
            "PATH": f"{self.slurm}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        chosen = [f"launcher={launcher}"] if launcher else []
        command = [sys.executable, "sweep.py", *arguments, *chosen, f"paths.outputs={self.outputs}"]
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def run(self, arguments: Sequence[str], launcher: str | None) -> str:
        code, output = ended(self.start(arguments, launcher))
        assert code == 0, output
        return output

    def requeued(self) -> list[str]:
        """Numbers of the jobs that went back into SLURM's queue."""
        calls = (self.slurm / "calls.txt").read_text().splitlines()
        requeue = "scontrol requeue "
        return [call.removeprefix(requeue) for call in calls if call.startswith(requeue)]

    def summaries(self) -> list[dict[str, Any]]:
        """Of the newest sweep's jobs, in their order."""
        newest = sorted((self.outputs / "sweeps").iterdir())[-1]
        files = sorted(newest.glob("[0-9]*/summary.json"), key=lambda file: int(file.parent.name))
        return [json.loads(file.read_text()) for file in files]


def ended(process: subprocess.Popen[str], seconds: float = LIMIT) -> tuple[int, str]:
    """Exit code and output of sweep.py, which ends with all that it started if it hangs.

    Raises:
        subprocess.TimeoutExpired: it hangs.
    """
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.terminate()
        process.communicate(timeout=60)
        raise
    return process.returncode, output


def made(summaries: Sequence[dict[str, Any]], stage: str) -> int:
    """How many artifacts of a stage were made, not found."""
    entries = [entry for summary in summaries for entry in summary["stages"] if entry["stage"] == stage]
    return sum(not entry["cached"] for entry in entries)


def wait_for(what: Callable[[], Any], seconds: float = 300) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.02)
    return found


def test_six_jobs_that_share_a_calibration_compute_it_once(launcher: str, tmp_path: Path) -> None:
    sweep = Sweep(tmp_path)
    output = sweep.run(SIX_JOBS, launcher)
    assert "in 2 waves: job 0 first" in output
    summaries = sweep.summaries()
    assert [summary["config"]["pruning"]["ratio"] for summary in summaries] == [0.1, 0.1, 0.2, 0.2, 0.3, 0.3]
    assert (made(summaries, "calibrate"), made(summaries, "score"), made(summaries, "prune")) == (1, 2, 6)
    assert made(sweep.run(SIX_JOBS, launcher) and sweep.summaries(), "prune") == 0


def job_process(sweep: Sweep, launcher: str) -> int:
    """The process that runs a job just now: the one that holds the calibration's lock."""
    (holder,) = wait_for(lambda: list((sweep.outputs / "artifacts" / "calibrate").glob(".*.holder")))
    try:
        return int(json.loads(holder.read_text())["pid"])
    except FileNotFoundError:
        pytest.fail("the calibration was faster than this test")


SLOW_CALIBRATION = "calibration.num_samples=256"


def test_a_job_killed_hard_is_finished_by_starting_again(launcher: str, tmp_path: Path) -> None:
    sweep = Sweep(tmp_path)
    arguments = (*TWO_JOBS, SLOW_CALIBRATION)
    process = sweep.start(arguments, launcher)
    os.kill(job_process(sweep, launcher), signal.SIGKILL)
    code, output = ended(process)
    if launcher != "ray":
        # The killed job is told as missing.
        assert code == 1, output
        assert re.search(r"1 of 2 jobs finished|0 of 2 jobs finished", output)
    sweep.run(arguments, launcher)
    undisturbed = Sweep(tmp_path / "undisturbed")
    undisturbed.run(arguments, None)
    found, expected = sweep.summaries(), undisturbed.summaries()
    assert [each["metrics"]["size"] for each in found] == [each["metrics"]["size"] for each in expected]
    keys = [[entry["key"] for entry in summary["stages"]] for summary in found]
    assert keys == [[entry["key"] for entry in summary["stages"]] for summary in expected]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_nothing_outlives_sweep_py(number: int, tmp_path: Path, launcher: str) -> None:
    if launcher == "submitit_slurm":
        pytest.skip("jobs of a cluster go on; report_only makes the tables")
    sweep = Sweep(tmp_path)
    process = sweep.start((*TWO_JOBS, SLOW_CALIBRATION), launcher)
    job = job_process(sweep, launcher)
    process.send_signal(number)
    ended(process, 120)
    wait_for(lambda: has_ended(job))


def test_no_worker_outlives_run_py(tmp_path: Path) -> None:
    """Nor do those of a multirun without sweep.py, whose process group is the shell's."""
    pytest.importorskip(PACKAGES["joblib"], reason="not installed; make launchers installs it")
    sweep = Sweep(tmp_path)
    jobs = ("model=tiny", *SMALL, SLOW_CALIBRATION, "pruning.ratio=0.1,0.2")
    command = [sys.executable, "run.py", "-m", "hydra/launcher=joblib", *jobs]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen([*command, f"paths.outputs={sweep.outputs}"], cwd=ROOT, env=environment) as process:
        job = job_process(sweep, "joblib")
        process.kill()
        wait_for(lambda: has_ended(job), seconds=20)


def has_ended(pid: int) -> bool:
    """Whether a process is gone, or waits only to be asked how it ended."""
    try:
        return "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2]
    except FileNotFoundError:
        return True


@pytest.mark.usefixtures("slurm")
def test_a_preempted_slurm_job_is_requeued_and_goes_on(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path)
    process = sweep.start((*TWO_JOBS, SLOW_CALIBRATION), "submitit_slurm")
    os.kill(job_process(sweep, "submitit_slurm"), signal.SIGUSR2)
    code, output = ended(process)
    assert code == 0, output
    assert sweep.requeued() == ["1000"]
    script = (sweep.slurm / "job_1000" / "script.sh").read_text()
    for line in ("--gpus-per-node=1", "--cpus-per-task=8", "--mem=64GB", "--time=240", "--signal=USR2@120"):
        assert f"#SBATCH {line}" in script
    assert made(sweep.summaries(), "calibrate") == 1


@pytest.mark.usefixtures("slurm")
def test_a_slurm_job_that_timed_out_too_often_fails_and_takes_no_other_along(tmp_path: Path) -> None:
    """With a limit of 10 minutes any signal counts as the limit's, and none is allowed."""
    sweep = Sweep(tmp_path)
    limits = ("hydra.launcher.timeout_min=10", "hydra.launcher.max_num_timeout=0")
    process = sweep.start((*TWO_JOBS, SLOW_CALIBRATION, *limits), "submitit_slurm")
    os.kill(job_process(sweep, "submitit_slurm"), signal.SIGUSR2)
    code, output = ended(process)
    assert code == 1
    assert "1 of 2 jobs finished" in output or "0 of 2 jobs finished" in output
    assert sweep.requeued() == []
    sweep.run((*TWO_JOBS, SLOW_CALIBRATION), "submitit_slurm")
    assert len(sweep.summaries()) == 2
