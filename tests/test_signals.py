"""Ctrl-C and SIGTERM: one line and the exit code that a shell expects, whatever libraries make of them."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ENDS = [(signal.SIGINT, 130, "interrupted: "), (signal.SIGTERM, 143, "terminated: ")]

INSIDE = """
import os, sys
from heapr.signals import one_line_ends
with one_line_ends():
    try:
        os.kill(os.getpid(), int(sys.argv[1]))
        while True: pass
    except BaseException as error:
        raise ModuleNotFoundError("as transformers' lazy imports say it") from error
"""
BEFORE = """
import os, sys
from heapr.signals import end_at_once
end_at_once()
os.kill(os.getpid(), int(sys.argv[1]))
import time; time.sleep(30)
"""
TWICE = """
import os, signal, sys
from heapr.signals import one_line_ends
with one_line_ends():
    try:
        os.kill(os.getpid(), int(sys.argv[1]))
        while True: pass
    finally:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        while True: pass
"""
AT_THE_END = """
import atexit, os, signal, sys
from heapr.signals import end_at_once, one_line_ends
end_at_once()
atexit.register(os.kill, os.getpid(), signal.SIGINT)
with one_line_ends(), one_line_ends():
    os.kill(os.getpid(), int(sys.argv[1]))
    while True: pass
"""
IN_A_DESTRUCTOR = """
import os, sys, time
from heapr.signals import one_line_ends
class Thing:
    def __del__(self):
        os.kill(os.getpid(), int(sys.argv[1]))
        for _ in range(1000): pass
with one_line_ends():
    Thing()
    time.sleep(30)
"""
AFTER = """
import os, sys
from heapr.signals import one_line_ends
with one_line_ends():
    raise ValueError("our own mistake")
"""


def run(program: str, number: int, prepare: object = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", program, str(int(number))]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, timeout=60, check=False, preexec_fn=prepare
    )


@pytest.mark.parametrize(("number", "code", "beginning"), ENDS)
@pytest.mark.parametrize("program", [BEFORE, INSIDE, TWICE, AT_THE_END, IN_A_DESTRUCTOR])
def test_a_signal_is_one_line_and_its_exit_code(program: str, number: int, code: int, beginning: str) -> None:
    ended = run(program, number, prepare=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    assert ended.returncode == code
    assert ended.stderr.startswith(beginning) and ended.stderr.count("\n") == 1


def test_an_error_without_a_signal_keeps_its_stack_trace() -> None:
    ended = run(AFTER, 0)
    assert ended.returncode == 1 and ended.stderr.endswith("ValueError: our own mistake\n")


def test_a_background_process_that_ignores_ctrl_c_goes_on_ignoring_it() -> None:
    program = BEFORE.replace("import time; time.sleep(30)", "print('still here')")
    ended = run(program, signal.SIGINT, prepare=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    assert (ended.returncode, ended.stdout) == (0, "still here\n")


WORKER = """
import time
from heapr.signals import end_worker_with_parent
end_worker_with_parent()
print('started', flush=True)
time.sleep(60)
"""
PARENT = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"


def test_a_worker_ends_when_who_started_it_is_killed() -> None:
    """As joblib's do not by themselves."""
    command = [sys.executable, "-c", PARENT, WORKER]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "started\n"
        parent.kill()
        killed = time.monotonic()
        # The worker holds the pipe as long as it lives.
        assert parent.stdout.read() == ""
    assert time.monotonic() - killed < 30
