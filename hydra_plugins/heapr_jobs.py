"""A sweeper for Hydra that runs an explicit list of jobs, which need not be a grid.

It uses the chosen launcher. In: a JSON file with the overrides of every job under "jobs" and, if they shall
not all start at once, their numbers in groups under "waves". Out: one folder per job, named by its number.
Hydra finds plug-ins in this folder; conf/hydra/sweeper/jobs.yaml selects this one.

It also registers the resolvers that conf/ uses, because Hydra makes a job's folder before any code of ours
runs, but imports its plug-ins first, in the processes of launchers too:

    ${home:path}        the path with ~ replaced by the home folder
    ${num_gpus:}        NVIDIA GPUs of this machine, without importing torch
    ${gpus_per_job:}    1 if there is one, else 0
    ${jobs_at_once:}    jobs that run side by side: one per GPU, else one for every four cores, at least 2
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf


def num_gpus() -> int:
    """NVIDIA GPUs that a process started now would see."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip()])
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def jobs_at_once() -> int:
    return num_gpus() or max(2, (os.cpu_count() or 1) // 4)


OmegaConf.register_new_resolver("home", os.path.expanduser, replace=True)
OmegaConf.register_new_resolver("num_gpus", num_gpus, replace=True)
OmegaConf.register_new_resolver("gpus_per_job", lambda: min(1, num_gpus()), replace=True)
OmegaConf.register_new_resolver("jobs_at_once", jobs_at_once, replace=True)


class JobsSweeper(Sweeper):
    """Launches the jobs of a file, wave after wave. A failed job leaves its error in its folder.

    Args:
        file: JSON, the overrides of every job under "jobs"; groups of their numbers under "waves".
        at_once: the most jobs that are given to the launcher at a time; None gives it a whole wave, except
            that submitit_local, which starts all jobs that it is given, gets `jobs_at_once`.
    """

    def __init__(self, file: str, at_once: int | None = None) -> None:
        super().__init__()
        self._file, self._at_once = Path(file), at_once
        self._launcher: Launcher | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.config = hydra_context, config
        self._launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )
        if self._at_once is None and type(self._launcher).__name__ == "LocalLauncher":
            self._at_once = jobs_at_once()

    def sweep(self, arguments: list[str]) -> list[Sequence[JobReturn]]:
        """Run the jobs; `arguments` are overrides that all of them get, last."""
        assert self._launcher is not None, "setup() comes first"
        content = json.loads(self._file.read_text(encoding="utf-8"))
        jobs = content["jobs"]
        waves = content.get("waves") or [list(range(len(jobs)))]
        returned = []
        started = 0
        for numbers in self._groups(waves):
            # Launchers number what they are given from `initial_job_idx` on; the folder says which job it is.
            overrides = [[*jobs[number], *arguments, f"hydra.sweep.subdir={number}"] for number in numbers]
            returned.append(self._launcher.launch(overrides, initial_job_idx=started))
            started += len(numbers)
        return returned

    def _groups(self, waves: Sequence[Sequence[int]]) -> Iterator[Sequence[int]]:
        for wave in waves:
            size = self._at_once or len(wave)
            for first in range(0, len(wave), size):
                yield wave[first : first + size]
