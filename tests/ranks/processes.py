"""Start several processes of one experiment, as torchrun does."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def start(size: int, command: Sequence[str], *, port: int | None = None) -> list[subprocess.Popen[str]]:
    """One process of a Python command for each rank."""
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port or free_port()), "WORLD_SIZE": str(size)}
    common = {**os.environ, **meeting, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    processes = []
    for rank in range(size):
        environment = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        process = subprocess.Popen(
            [sys.executable, *command],
            env=environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
    return processes


def finish(processes: Sequence[subprocess.Popen[str]], seconds: float) -> list[tuple[int, str]]:
    """Exit code and stderr of every rank; none is left behind.

    Raises:
        subprocess.TimeoutExpired: one has not ended by itself.
    """
    try:
        ended = []
        for process in processes:
            _, stderr = process.communicate(timeout=seconds)
            ended.append((process.returncode, stderr))
        return ended
    finally:
        for process in processes:
            process.kill()
