"""run.py as a program of its own, forked from a process that has imported everything, and ended by a signal.

Imports take longer than all that is tried here; apart from them, each attempt is what a shell starts: its own
process, arguments, output and exit code.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from tests.ranks.processes import as_program

IMPORTED = ["tests.faults.points", "lm_eval", "transformers.models.qwen3_moe"]
LIMIT = 120.0  # seconds for one attempt


class Ended(NamedTuple):
    """How an attempt ended.

    Attributes:
        code: exit code; minus the number of the signal that killed it.
        output: stdout and stderr.
        seconds: that it took.
    """

    code: int
    output: str
    seconds: float


def attempt(
    function: Callable[..., None],
    *arguments: Any,
    number: int = signal.SIGKILL,
    after: float | None = None,
) -> Ended:
    """Call a function of a module in `IMPORTED` as a program.

    Args:
        function, arguments: what is called.
        number: of the signal that it gets.
        after: so many seconds; None sends none.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    with tempfile.TemporaryDirectory(prefix="heapr-attempt-") as folder:
        output = Path(folder) / "output.txt"
        environment = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        process = context.Process(target=as_program, args=(environment, output, function, arguments))
        process.start()
        started = time.monotonic()
        if after is not None:
            process.join(after)
            if process.exitcode is None and process.pid is not None:
                signal_to(process.pid, number)
        process.join(LIMIT)
        seconds = time.monotonic() - started
        hangs = process.exitcode is None
        process.kill()
        said = output.read_text() if output.exists() else ""
        assert not hangs, f"hangs: {said}"
        return Ended(int(process.exitcode or 0), said, seconds)


def signal_to(pid: int, number: int) -> None:
    """Send a signal to a process that may be gone."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def run_py(arguments: Sequence[str]) -> None:
    """`python run.py <arguments>`, in the foreground, where Ctrl-C counts."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["run.py", *arguments]
    runpy.run_path("run.py", run_name="__main__")
