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

import yaml
from hydra.errors import HydraException

from heapr.artifacts import LOG, SUMMARY, read_error, read_summary
from heapr.errors import ConfigError
from heapr.files import write_json
from heapr.report.sweep.check_summary import problem_of
from heapr.report.sweep.results import JobResult
from heapr.sweep.definition import grid
from heapr.words import first_line

logger = logging.getLogger(__name__)

RECORD = "sweep.json"
OVERRIDES, MULTIRUN, BASIC_SWEEPER = ".hydra/overrides.yaml", "multirun.yaml", "BasicSweeper"  # Hydra's names


RECORD_TEXTS = ("experiment", "version", "command", "date", "title")


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
        """The record in a folder.

        Raises:
            ConfigError: it is damaged.
        """
        path = folder / RECORD
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            record = cls(**content)
        except (OSError, ValueError, RecursionError, TypeError) as error:
            raise _damaged(path, first_line(error)) from error
        is_text = all(isinstance(getattr(record, name), str) for name in RECORD_TEXTS)
        has_jobs = isinstance(record.jobs, list) and all(map(_is_list_of_text, record.jobs))
        has_report = isinstance(record.report, list | tuple) and all(
            isinstance(one, dict) for one in record.report
        )
        if not (is_text and has_jobs and has_report):
            raise _damaged(path, "a field is of another type")
        return record


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
    except ConfigError as error:
        logger.warning("%s; this sweep is left out", error)
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
            started[int(path.name)] = tuple(_texts(_read_yaml(path / OVERRIDES)))
    return _asked_of_hydra(folder) | dict(sorted(started.items()))


def _asked_of_hydra(folder: Path) -> dict[int, tuple[str, ...]]:
    """Return the overrides of all jobs of a `python run.py -m`; empty for other sweepers than Hydra's own."""
    if not (folder / MULTIRUN).is_file():
        return {}
    content = _read_yaml(folder / MULTIRUN)
    try:
        sweeper, asked = content["hydra"]["sweeper"]["_target_"], content["hydra"]["overrides"]["task"]
    except (KeyError, TypeError) as error:
        raise _damaged(folder / MULTIRUN, first_line(error)) from error
    if not str(sweeper).endswith(BASIC_SWEEPER):
        return {}
    jobs = {}
    try:
        asked_jobs = grid(_texts(asked))
    except HydraException as error:
        raise _damaged(folder / MULTIRUN, first_line(error)) from error
    for number, job in enumerate(asked_jobs):
        jobs[number] = tuple(f"{key}={value}" for key, value in job.items())
    return jobs


def _read_yaml(path: Path) -> Any:
    """The content of one of Hydra's files. A ${...} in it stays as it is, because it may name a secret.

    Raises:
        ConfigError: the file is damaged.
    """
    try:
        return yaml.safe_load(path.read_bytes())
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise _damaged(path, first_line(error)) from error


def _is_list_of_text(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def _texts(values: Any) -> list[str]:
    """A list of overrides; empty for anything else."""
    return [str(value) for value in values] if isinstance(values, list) else []


def _damaged(path: Path, why: str) -> ConfigError:
    return ConfigError(f"'{path}' is damaged ({why}); remove it, or get it again")


def _collect_job(folder: Path, number: int, overrides: tuple[str, ...]) -> JobResult:
    if not folder.is_dir():
        return JobResult(number, overrides, None, None, "never started")
    error = read_error(folder)
    try:
        summary = read_summary(folder)
    except ConfigError as damage:
        return JobResult(number, overrides, folder, None, str(damage))
    problem = None if summary is None else problem_of(summary)
    if problem is not None:
        told = _damaged(folder / SUMMARY, problem)
        return JobResult(number, overrides, folder, None, str(told))
    if summary is None and error is None:
        error = f"was stopped before it finished; its log: {folder / LOG}"
    if summary is not None:
        error = None
    return JobResult(number, overrides, folder, summary, error)
