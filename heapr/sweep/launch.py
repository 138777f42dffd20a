"""Runs the jobs of a sweep through Hydra's multirun.

In: jobs and a folder. Out: the folder filled, one subfolder per job. The jobs run in a process of their own,
which does what `heapr -m` does, so every launcher works. Signals are passed on to it, and nothing is
left running when this process ends, however it ends.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from types import FrameType

from heapr.definitions import import_folder
from heapr.signals import STARTED_BY
from heapr.sweep.collect import RECORD, Record

PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2)
PROGRAM = ("-m", "heapr")
KILLED_BY = 128  # plus the signal's number: a shell's exit code for a process that a signal ended
PATIENCE_SECONDS = 5.0  # between asking what is left of the jobs' processes to end, and killing it


def new_folder(sweeps: Path, record: Record) -> Path:
    """Create a folder for a sweep, with its record, and return it."""
    folder = sweeps / f"{datetime.now():%Y-%m-%d_%H-%M-%S-%f}_{record.experiment}_{record.version}"
    folder.mkdir(parents=True)
    record.write(folder)
    return folder


def launch(folder: Path, settings: Sequence[str], program: Sequence[str] = PROGRAM) -> int:
    """Run all jobs and wait for them.

    The first signal is passed on, so that jobs end in order; a second one kills them.

    Args:
        folder: of the sweep.
        settings: overrides of Hydra itself, such as its launcher.
        program: what Python runs for the jobs.

    Returns:
        the exit code; 0 even if jobs failed, because each says so in its own folder.
    """
    chosen = [
        "hydra/sweeper=jobs",
        f"hydra.sweeper.file={_quoted(folder / RECORD)}",
        f"hydra.sweep.dir={_quoted(folder)}",
    ]
    return run_and_end([sys.executable, *program, "--multirun", *chosen, *settings])


def run_and_end(command: Sequence[str]) -> int:
    """Run a command, pass signals on to it, and end every process that it leaves behind.

    Returns:
        Its exit code; 128 plus the signal's number if a signal ended it.
    """
    # Python finds this heapr, and Hydra its plug-ins, from every folder and in the processes of launchers.
    places = [str(import_folder()), os.environ.get("PYTHONPATH", "")]
    path = os.pathsep.join(filter(None, places))
    environment = os.environ | {STARTED_BY: str(os.getpid()), "PYTHONPATH": path}
    # A process group of its own: the terminal's Ctrl-C reaches it through us, once, and we can end all of it.
    with subprocess.Popen(command, env=environment, start_new_session=True) as process:
        try:
            with _passing_signals_on(process):
                code = process.wait()
                return code if code >= 0 else KILLED_BY - code
        finally:
            _end_group(process.pid)


@contextmanager
def _passing_signals_on(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """The first signal goes to the process; any further one kills its group."""
    if threading.current_thread() is not threading.main_thread():  # where no signals arrive
        yield
        return
    received: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) == 1:
            process.send_signal(number)
        else:
            _signal_group(process.pid, signal.SIGKILL)

    previous = {number: signal.signal(number, pass_on) for number in PASSED_ON}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _end_group(group: int) -> None:
    """End what is left of the jobs' processes: workers of a launcher that was killed, for example."""
    _signal_group(group, signal.SIGTERM)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while _signal_group(group, 0) and time.monotonic() < deadline:
        time.sleep(0.05)
    _signal_group(group, signal.SIGKILL)


def _signal_group(group: int, number: int) -> bool:
    """Send a signal to a process group; whether it still has members."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True


def _quoted(path: Path) -> str:
    """Quote a path so that Hydra reads any characters in it as they are."""
    text = str(path.resolve()).replace("'", "\\'")
    return f"'{text}'"
