"""What Hydra calls at the end of every job, so that a long sweep's memory stays as it is.

conf/config.yaml names it.
"""

from __future__ import annotations

from typing import Any

from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from omegaconf import DictConfig


class ForgetConfigs(Callback):
    """Empties what Hydra keeps of every finished job until its sweep ends, except for what the job returned.

    A job's two configurations take about 0.2 MB; they are in the job's folder.
    """

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        job_return.cfg = job_return.hydra_cfg = None
