"""The jobs of a sweep, read from its folder: what finished, what failed and why.

In: the folder of a sweep, made by sweep.py or by `python run.py -m`. Out: one `JobResult` for every job, even
if it never started.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from heapr.artifacts import LOG, read_error, read_summary
from heapr.errors import ConfigError
from heapr.files import write_json
from heapr.report.sweep.results import JobResult
from heapr.sweep.definition import grid
from heapr.words import first_line

logger = logging.getLogger(__name__)

RECORD = "sweep.json"
OVERRIDES, MULTIRUN, BASIC_SWEEPER = ".hydra/overrides.yaml", "multirun.yaml", "BasicSweeper"  # Hydra's names


@dataclass(frozen=True)
class Record:
    """What a sweep was asked to do: `sweep.json` in its folder.

    Attributes:
        experiment: its name.
        version: "paper" or "tiny".
        command: that started the sweep.
        date: of the start.
        jobs: overrides of each.
        waves: numbers of jobs in the order in which they start; empty starts all at once.
        title: of the experiment.
        report: tables and figures of the experiment.
    """

    experiment: str
    version: str
    command: str
    date: str
    jobs: list[list[str]]
    waves: list[list[int]] = field(default_factory=list)
    title: str = ""
    report: Sequence[Mapping[str, Any]] = ()

    @property
    def layout(self) -> dict[str, Any]:
        """Return title, command, date and entries as `heapr.report.sweep.report` takes them."""
        return {"title": self.title, "command": self.command, "date": self.date, "entries": list(self.report)}

    def write(self, folder: Path) -> None:
        write_json(folder / RECORD, asdict(self))

    @classmethod
    def read(cls, folder: Path) -> Record:
        return cls(**json.loads((folder / RECORD).read_text(encoding="utf-8")))


def newest_sweep(sweeps: Path, experiment: str, version: str) -> Path:
    """Return the folder of the last sweep of an experiment.

    Raises:
        ConfigError: there is no such sweep.
    """
    folders = [path.parent for path in sweeps.glob(f"*/{RECORD}")]
    for folder in sorted(folders, reverse=True):
        record = _readable_record(folder)
        if record and (record.experiment, record.version) == (experiment, version):
            return folder
    raise ConfigError(
        f"'{sweeps}' holds no sweep of {experiment} ({version}); run it without report_only first"
    )


def _readable_record(folder: Path) -> Record | None:
    """The record in a folder; None, with a warning, if it is damaged: other sweeps are found all the same."""
    try:
        return Record.read(folder)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        logger.warning("'%s' is damaged (%s); this sweep is left out", folder / RECORD, first_line(error))
        return None


def collect_jobs(folder: Path) -> list[JobResult]:
    """Return the result of every job of a sweep, in order.

    Raises:
        ConfigError: the folder does not exist, or holds no sweep.
    """
    if not folder.is_dir():
        raise ConfigError(f"'{folder}' is not a folder; give one below outputs/sweeps")
    jobs = _overrides_of_jobs(folder)
    if not jobs:
        raise ConfigError(
            f"'{folder}' holds no jobs of a sweep; give a folder made by sweep.py or python run.py -m"
        )
    return [_collect_job(folder / str(number), number, overrides) for number, overrides in jobs.items()]


def _overrides_of_jobs(folder: Path) -> dict[int, tuple[str, ...]]:
    """Return the overrides of each job by number, including jobs that never started if they are on record."""
    if (folder / RECORD).is_file():
        return {number: tuple(job) for number, job in enumerate(Record.read(folder).jobs)}
    started: dict[int, tuple[str, ...]] = {}
    for path in folder.iterdir():
        if path.name.isdigit() and (path / OVERRIDES).is_file():
            overrides = OmegaConf.load(path / OVERRIDES)
            started[int(path.name)] = tuple(map(str, overrides))
    return _asked_of_hydra(folder) | dict(sorted(started.items()))


def _asked_of_hydra(folder: Path) -> dict[int, tuple[str, ...]]:
    """Return the overrides of all jobs of a `python run.py -m`; empty for other sweepers than Hydra's own."""
    if not (folder / MULTIRUN).is_file():
        return {}
    hydra = OmegaConf.load(folder / MULTIRUN).hydra
    if not str(hydra.sweeper._target_).endswith(BASIC_SWEEPER):
        return {}
    jobs = {}
    for number, job in enumerate(grid(list(hydra.overrides.task))):
        jobs[number] = tuple(f"{key}={value}" for key, value in job.items())
    return jobs


def _collect_job(folder: Path, number: int, overrides: tuple[str, ...]) -> JobResult:
    if not folder.is_dir():
        return JobResult(number, overrides, None, None, "never started")
    summary, error = read_summary(folder), read_error(folder)
    if summary is None and error is None:
        error = f"was stopped before it finished; its log: {folder / LOG}"
    if summary:
        error = None
    return JobResult(number, overrides, folder, summary, error)
