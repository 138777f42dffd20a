"""Nothing of a sweep outlives sweep.py: signals are passed on, and its end, however it comes, ends the jobs.

The jobs' process is a stand-in for run.py that starts a worker of its own, as launchers do.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

JOBS = """
import subprocess, sys, time
from pathlib import Path
from heapr.signals import end_with_parent, one_line_ends

end_with_parent()
worker = subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal({ignored}, signal.SIG_IGN); time.sleep(60)"])
with one_line_ends():
    try:
        Path("pids").write_text(f"{{__import__('os').getpid()}} {{worker.pid}}")
        {body}
    except KeyboardInterrupt as end:
        Path("got").write_text(type(end).__name__)
        {cleanup}
        raise
"""
SWEEP = """
import sys
from pathlib import Path
from heapr.sweep.launch import launch

sys.exit(launch(Path("sweep"), ["setting=1"], ["run.py"]))
"""


def wait_for(what: Callable[[], bool], seconds: float = 20) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if what():
            return True
        time.sleep(0.05)
    return what()


def is_running(pid: int) -> bool:
    """Zombies, which nobody waits for in a container without an init, are not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


class Sweep:
    """A process that waits for its jobs' process."""

    def __init__(
        self,
        folder: Path,
        *,
        body: str = "time.sleep(60)",
        cleanup: str = "pass",
        ignored: str = "signal.SIGUSR1",
    ) -> None:
        self.folder = folder
        (folder / "run.py").write_text(JOBS.format(body=body, cleanup=cleanup, ignored=ignored))
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
        self.process = subprocess.Popen(
            [sys.executable, "-c", SWEEP], cwd=folder, env=environment, stderr=subprocess.PIPE, text=True
        )

    def started(self) -> list[int]:
        """Ids of the jobs' process and of its worker."""
        file = self.folder / "pids"
        assert wait_for(lambda: file.is_file() and len(file.read_text().split()) == 2)
        return [int(pid) for pid in file.read_text().split()]

    def end(self) -> tuple[int, str]:
        _, messages = self.process.communicate(timeout=30)
        return self.process.returncode, messages


def test_the_exit_code_is_the_jobs_and_they_get_the_settings(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, body="Path('arguments').write_text(' '.join(sys.argv[1:])); sys.exit(3)")
    _, worker = sweep.started()
    assert sweep.end()[0] == 3
    arguments = (tmp_path / "arguments").read_text()
    assert arguments.startswith("--multirun hydra/sweeper=jobs hydra.sweeper.file=")
    assert arguments.endswith("setting=1")
    assert not is_running(worker)


@pytest.mark.parametrize(
    ("number", "raised", "code", "word"),
    [
        (signal.SIGINT, "KeyboardInterrupt", 130, "interrupted: "),
        pytest.param(signal.SIGTERM, "Terminated", 143, "terminated: ", marks=pytest.mark.slow),
    ],
)
def test_a_signal_is_passed_on_once_and_ends_all_in_one_line(
    tmp_path: Path, number: int, raised: str, code: int, word: str
) -> None:
    sweep = Sweep(tmp_path)
    jobs, worker = sweep.started()
    sweep.process.send_signal(number)
    returned, messages = sweep.end()
    assert returned == code
    assert (tmp_path / "got").read_text() == raised
    assert messages.startswith(word)
    assert messages.count("\n") == 1
    assert not is_running(jobs)
    assert not is_running(worker)


@pytest.mark.slow
def test_a_second_signal_kills(tmp_path: Path) -> None:
    """The jobs' process is in no hurry, and its worker ignores what it is asked."""
    sweep = Sweep(tmp_path, cleanup="time.sleep(60)", ignored="signal.SIGTERM")
    jobs, worker = sweep.started()
    sweep.process.send_signal(signal.SIGINT)
    assert wait_for((tmp_path / "got").is_file)
    sweep.process.send_signal(signal.SIGINT)
    assert sweep.end()[0] == 128 + signal.SIGKILL
    assert not is_running(jobs)
    assert not is_running(worker)


def test_the_jobs_do_not_outlive_a_sweep_that_is_killed(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path)
    jobs, worker = sweep.started()
    sweep.process.kill()
    sweep.end()
    assert wait_for(lambda: not is_running(jobs))
    assert wait_for(lambda: not is_running(worker))
