"""Which of several processes this one is: what torchrun, accelerate launch or srun put into its environment.

In: environment variables. Out: a `Place`; None for a process that works alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from heapr.errors import ConfigError

HOW = "start with torchrun --nproc-per-node=N run.py ... or srun, or unset WORLD_SIZE for one process"
# Ports for jobs of SLURM; below those that Linux gives to clients.
FIRST_PORT, NUM_PORTS = 20_000, 12_000


@dataclass(frozen=True)
class Place:
    """One of several processes that work on one experiment.

    Attributes:
        rank: its number, from 0 on.
        size: number of processes, at least 2.
        local_rank: its number among those of its machine.
        host, port: where rank 0, or torchrun for it, listens.
        attempt: how often torchrun has started all again.
        has_listener: torchrun listens there already.
    """

    rank: int
    size: int
    local_rank: int
    host: str
    port: int
    attempt: int = 0
    has_listener: bool = False


def place_of(environment: Mapping[str, str]) -> Place | None:
    """Read torchrun's variables, which accelerate sets too, or else srun's.

    Raises:
        ConfigError: there should be several processes, and the variables do not say where they meet.
    """
    if "WORLD_SIZE" in environment:
        return _of_torchrun(environment)
    # Not SLURM_NTASKS, which a batch script has too, where only srun starts several processes.
    if "SLURM_PROCID" in environment and "SLURM_STEP_NUM_TASKS" in environment:
        return _of_slurm(environment)
    return None


def _of_torchrun(environment: Mapping[str, str]) -> Place | None:
    size = _number(environment, "WORLD_SIZE")
    if size <= 1:
        return None
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in environment]
    if missing:
        raise ConfigError(f"WORLD_SIZE={size}, but there is no {' and no '.join(missing)}; {HOW}")
    rank = _number(environment, "RANK")
    if not 0 <= rank < size:
        raise ConfigError(f"RANK={rank} is not below WORLD_SIZE={size}; {HOW}")
    return Place(
        rank=rank,
        size=size,
        local_rank=_number(environment, "LOCAL_RANK", str(rank)),
        host=environment["MASTER_ADDR"],
        port=_number(environment, "MASTER_PORT"),
        attempt=_number(environment, "TORCHELASTIC_RESTART_COUNT", "0"),
        has_listener=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


def _of_slurm(environment: Mapping[str, str]) -> Place | None:
    size = _number(environment, "SLURM_STEP_NUM_TASKS")
    if size <= 1:
        return None
    nodes = environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_JOB_NODELIST", ""))
    host = environment.get("MASTER_ADDR", first_host(nodes))
    if not host:
        raise ConfigError(f"srun started {size} tasks, but there is no SLURM_STEP_NODELIST; set MASTER_ADDR")
    rank = _number(environment, "SLURM_PROCID")
    if rank >= size:
        raise ConfigError(f"SLURM_PROCID={rank} is not below SLURM_STEP_NUM_TASKS={size}; {HOW}")
    job, step = _number(environment, "SLURM_JOB_ID", "0"), _number(environment, "SLURM_STEP_ID", "0")
    port = FIRST_PORT + (job * 7 + step) % NUM_PORTS
    return Place(
        rank=rank,
        size=size,
        local_rank=_number(environment, "SLURM_LOCALID"),
        host=host,
        port=_number(environment, "MASTER_PORT", str(port)),
    )


def first_host(nodes: str) -> str:
    """The first host of a SLURM node list: node03 of "node[03-07,12],other"."""
    found = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\])?([^,]*)", nodes)
    return "" if found is None else "".join(part or "" for part in found.groups())


def _number(environment: Mapping[str, str], name: str, default: str | None = None) -> int:
    text = environment.get(name, default)
    if text is None or not re.fullmatch(r"\d+", text):
        raise ConfigError(f"{name}={text!r} in the environment is not a number; {HOW}")
    return int(text)
