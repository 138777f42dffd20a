"""The jobs of a sweep as they lie in its folder: what finished, what failed and why.

In: the folder of a sweep, made by sweep.py or by `python run.py -m`. Out: one `JobResult` for each job, never
fewer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from heapr.artifacts import LOG, read_error, read_summary
from heapr.errors import ConfigError
from heapr.files import write_json
from heapr.report.sweep.results import JobResult
from heapr.sweep.definition import grid

RECORD = "sweep.json"
OVERRIDES, MULTIRUN, BASIC_SWEEPER = ".hydra/overrides.yaml", "multirun.yaml", "BasicSweeper"  # Hydra's names


@dataclass(frozen=True)
class Record:
    """What was asked for; `sweep.json` of a sweep's folder.

    Attributes:
        experiment, version: its name, and whether it is "paper" or "tiny".
        command, date: that started the sweep.
        jobs: overrides of each.
        title: of the experiment.
        report: its tables and figures.
    """

    experiment: str
    version: str
    command: str
    date: str
    jobs: list[list[str]]
    title: str = ""
    report: Sequence[Mapping[str, Any]] = ()

    @property
    def layout(self) -> dict[str, Any]:
        """As the report takes it."""
        return {"title": self.title, "command": self.command, "date": self.date, "entries": list(self.report)}

    def write(self, folder: Path) -> None:
        write_json(folder / RECORD, asdict(self))

    @classmethod
    def read(cls, folder: Path) -> Record:
        return cls(**json.loads((folder / RECORD).read_text(encoding="utf-8")))


def newest_sweep(sweeps: Path, experiment: str, version: str) -> Path:
    """The folder of the last sweep of an experiment.

    Raises:
        ConfigError: there is none.
    """
    for folder in sorted((path.parent for path in sweeps.glob(f"*/{RECORD}")), reverse=True):
        record = Record.read(folder)
        if (record.experiment, record.version) == (experiment, version):
            return folder
    raise ConfigError(
        f"'{sweeps}' holds no sweep of {experiment} ({version}); run it without report_only first"
    )


def collect_jobs(folder: Path) -> list[JobResult]:
    """Every job of a sweep.

    Raises:
        ConfigError: the folder is not that of a sweep.
    """
    if not folder.is_dir():
        raise ConfigError(f"'{folder}' is no folder; give one below outputs/sweeps")
    jobs = _overrides_of_jobs(folder)
    if not jobs:
        raise ConfigError(
            f"'{folder}' holds no jobs of a sweep; give a folder that sweep.py or python run.py -m made"
        )
    return [_collect_job(folder / str(number), number, overrides) for number, overrides in jobs.items()]


def _overrides_of_jobs(folder: Path) -> dict[int, tuple[str, ...]]:
    """By number; jobs that never started too, where the folder says what they would have been."""
    if (folder / RECORD).is_file():
        return {number: tuple(job) for number, job in enumerate(Record.read(folder).jobs)}
    started = {
        int(path.name): path / OVERRIDES
        for path in folder.iterdir()
        if path.name.isdigit() and (path / OVERRIDES).is_file()
    }
    jobs = {
        number: tuple(str(override) for override in OmegaConf.load(started[number]))
        for number in sorted(started)
    }
    if (folder / MULTIRUN).is_file():
        hydra = OmegaConf.load(folder / MULTIRUN).hydra
        if str(hydra.sweeper._target_).endswith(BASIC_SWEEPER):
            asked = grid(list(hydra.overrides.task))
            jobs = {
                number: tuple(f"{key}={value}" for key, value in job.items())
                for number, job in enumerate(asked)
            } | jobs
    return jobs


def _collect_job(folder: Path, number: int, overrides: tuple[str, ...]) -> JobResult:
    if not folder.is_dir():
        return JobResult(number, overrides, None, None, "never started")
    summary, error = read_summary(folder), read_error(folder)
    if summary is None and error is None:
        error = f"was stopped before it finished; its log: {folder / LOG}"
    return JobResult(number, overrides, folder, summary, None if summary else error)
