"""A sweeper for Hydra that runs an explicit list of jobs, which need not be a grid, through the chosen
launcher.

In: a JSON file with the overrides of every job under "jobs". Out: one folder per job, numbered from 0. Hydra
finds plug-ins in this folder; conf/hydra/sweeper/jobs.yaml selects this one.

Also what conf/config.yaml calls `${home:...}`: a path with ~ for the home folder. It is here because Hydra
makes a job's folder before any code of ours runs, but imports its plug-ins first, in the processes of
launchers too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

OmegaConf.register_new_resolver("home", os.path.expanduser, replace=True)


class JobsSweeper(Sweeper):
    """Launches all jobs of a file at once. A job that fails is told by what it leaves in its folder.

    Args:
        file: JSON, the overrides of every job under "jobs".
    """

    def __init__(self, file: str) -> None:
        super().__init__()
        self._file = Path(file)
        self._launcher: Launcher | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.config = hydra_context, config
        self._launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Sequence[JobReturn]:
        """Run the jobs; `arguments` are overrides that all of them get, last."""
        assert self._launcher is not None, "setup() comes first"
        jobs = [[*job, *arguments] for job in json.loads(self._file.read_text(encoding="utf-8"))["jobs"]]
        return self._launcher.launch(jobs, initial_job_idx=0)
