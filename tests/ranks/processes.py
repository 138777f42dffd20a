"""Start the ranks of one experiment, with the environment that torchrun gives them.

They are forked from one process that has imported everything, because imports take longer than all that is
tested here; each has an environment, an output and an exit code of its own.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
IMPORTED = ["tests.ranks.failing", "tests.ranks.several_runs", "lm_eval", "transformers.models.qwen3_moe"]


class Started(NamedTuple):
    """A rank that runs, and the file that gets its stdout and stderr."""

    process: ForkServerProcess
    output: Path


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def meeting_of(size: int, port: int | None = None) -> dict[str, str]:
    """What all ranks find in their environment."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port or free_port())}
    return {**where, "WORLD_SIZE": str(size), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def start(
    size: int, function: Callable[..., None], *arguments: Any, port: int | None = None
) -> list[Started]:
    """Call a function of a module in `IMPORTED` in one process for each rank."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    meeting = meeting_of(size, port)
    folder = Path(tempfile.mkdtemp(prefix="heapr-ranks-"))
    started = []
    for rank in range(size):
        environment = {**meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        output = folder / f"{rank}.txt"
        process = context.Process(target=as_program, args=(environment, output, function, arguments))
        process.start()
        started.append(Started(process, output))
    return started


def as_program(
    environment: Mapping[str, str], output: Path, function: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    """Call a function as if it were a program of its own, and end the process as Python ends one."""
    os.environ.update(environment)
    os.chdir(ROOT)
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115 - until the process ends
    code = 0
    try:
        function(*arguments)
    except SystemExit as end:
        code = 0 if end.code is None else int(end.code)
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def finish(started: list[Started], seconds: float) -> list[tuple[int, str]]:
    """Exit code (minus the signal's number if one ended it) and output of every rank; none is left behind.

    Raises:
        AssertionError: one has not ended by itself.
    """
    try:
        for process, output in started:
            process.join(seconds)
            assert process.exitcode is not None, f"{process.name} hangs: {output.read_text()}"
        return [(int(process.exitcode or 0), output.read_text()) for process, output in started]
    finally:
        for process, _ in started:
            process.kill()
