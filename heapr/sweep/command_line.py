"""The command line `heapr-sweep` or `python sweep.py`: forecast, run, report.

In: `experiment=<name>` and overrides, or `report_dir=<folder>`. Out: a sweep's folder with jobs, tables,
figures and report.html; exit code 1 if a job failed, 2 with one line for the user's mistake.
"""

from __future__ import annotations

import csv
import importlib
import logging
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from heapr.artifacts import SWEEPS
from heapr.compose_experiment import compose_experiment
from heapr.definitions import CONF, EXPERIMENTS, definitions_folder, sweep_command
from heapr.errors import ConfigError
from heapr.explain import OF_LAUNCHER, explain
from heapr.one_line_errors import one_line_errors, print_whatever_the_encoding
from heapr.overrides import explain_launcher
from heapr.schema import ExperimentConfig, register
from heapr.sweep.definition import Definition, Job, experiment_names, load_definition, make_jobs
from heapr.sweep.request import Request, read_request
from heapr.unread_output import until_nobody_reads

logger = logging.getLogger(__name__)

SWEEPER = "hydra/sweeper=jobs"
MAX_FIGURE = 300_000  # bytes of a figure that is kept with an experiment


def main() -> None:
    """Do what the command line asks, and exit."""
    run_command(sys.argv[1:], definitions_folder())


def run_command(arguments: Sequence[str], root: Path) -> None:
    """Do what arguments ask, and exit.

    Args:
        arguments: of the command line.
        root: folder of conf/ and experiments/.
    """
    print_whatever_the_encoding()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s", stream=sys.stderr)
    # It says how to send what wandb could not.
    logging.getLogger("heapr.tracking.wandb").setLevel(logging.INFO)
    if {"-h", "--help"} & set(arguments):
        with until_nobody_reads():
            _help(root)
        return
    with one_line_errors(root / CONF):
        request = read_request(arguments, experiment_names(root / EXPERIMENTS))
        if request.report_dir is not None:
            sys.exit(_report(root, request.report_dir)[0])
        sys.exit(sweep(root, request))


def sweep(root: Path, request: Request) -> int:
    """Forecast, run and report an experiment.

    Args:
        root: folder of conf/ and experiments/.
        request: what the command line asks for.

    Returns:
        Exit code: 1 if a job failed.

    Raises:
        ConfigError: the experiment or an override is unknown, or no job can run.
    """
    assert request.experiment is not None
    definition = load_definition(root / EXPERIMENTS, request.experiment)
    jobs = make_jobs(definition, request.overrides, baselines=request.baselines)
    if request.report_only:
        return _report_newest(root, request, definition, jobs)
    configs = compose_jobs(definition.name, jobs, root / CONF, request.search_path)
    _check_settings(request.settings, root / CONF)
    from heapr.sweep.forecast import forecast_sweep
    from heapr.sweep.forecast_table import print_forecast
    from heapr.sweep.waves import waves

    forecast = forecast_sweep(jobs, configs)
    plan = waves(forecast.expensive_to_make()) if request.has_launcher else []
    print_forecast(forecast, f"{definition.name} ({request.version}): {definition.title}", plan)
    if request.dry_run:
        return 0
    problems = [job.problem for job in forecast.jobs if job.problem]
    if len(problems) == len(jobs):
        raise ConfigError(f"no job of {definition.name} can run; the first: {problems[0]}")
    return _run(root, request, definition, dict(zip(jobs, configs, strict=True)), plan)


def compose_jobs(
    experiment: str, jobs: Sequence[Job], config_folder: Path, search_path: Sequence[str] = ()
) -> list[ExperimentConfig]:
    """Return the checked configuration of every job.

    Args:
        experiment: its name, for messages.
        jobs: overrides of each.
        config_folder: conf/.
        search_path: overrides that add folders to it.

    Raises:
        ConfigError: the configuration of a job is invalid; the message names the job.
    """

    def compose_job(number: int, job: Job) -> ExperimentConfig:
        try:
            return compose_experiment([*search_path, *job], config_folder)
        except (ConfigError, HydraException, OmegaConfBaseException) as error:
            reason = explain(error, config_folder, job)
            raise ConfigError(f"job {number} of {experiment} ({' '.join(job)}): {reason}") from error

    return [compose_job(number, job) for number, job in enumerate(jobs)]


def _report(root: Path, folder: Path) -> tuple[int, list[Path]]:
    """Write the tables and figures of a sweep into its folder.

    Returns:
        Exit code, 1 if a job had failed; and the files.

    Raises:
        ConfigError: the folder holds no sweep, or results that cannot share a table.
    """
    from heapr.report.sweep.report import write_report
    from heapr.sweep.collect import RECORD, Record, collect_jobs

    jobs = collect_jobs(folder)
    layout = Record.read(folder).layout if (folder / RECORD).is_file() else {}
    files = write_report(jobs, layout, folder, root / EXPERIMENTS / "published")
    failed = [job for job in jobs if job.summary is None]
    lines = [
        f"{len(jobs) - len(failed)} of {len(jobs)} jobs finished; tables, figures and report.html: {folder}"
    ]
    lines += [f"  job {job.number} failed ({' '.join(job.overrides)}): {job.error}" for job in failed]
    Console(soft_wrap=True).print("\n".join(lines), markup=False, highlight=False)
    return 1 if failed else 0, files


def keep_results(root: Path, folder: Path, files: Sequence[Path]) -> Path:
    """Copy a sweep's report to its experiment, and drop the page's links to artifacts that are not copied.

    Args:
        root: folder of experiments/.
        folder: of the sweep.
        files: of its report, below the folder.

    Returns:
        The folder of the copies.
    """
    from heapr.report.sweep.page import without_local_links
    from heapr.sweep.collect import Record

    record = Record.read(folder)
    kept = root / EXPERIMENTS / record.experiment / "results" / record.version
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir(parents=True)
    for file in files:
        if file.suffix in (".svg", ".png") and file.stat().st_size > MAX_FIGURE:
            size = file.stat().st_size
            logger.warning("%s has %d bytes; kept figures should have at most %d", file, size, MAX_FIGURE)
        copy = kept / file.relative_to(folder)
        copy.parent.mkdir(exist_ok=True)
        if file.suffix == ".html":
            copy.write_text(without_local_links(file.read_text(encoding="utf-8")), encoding="utf-8")
        else:
            shutil.copy(file, copy)
    about = f"# {record.experiment}, {record.version}\n\n    {record.command}\n\nRun on {record.date}.\n"
    (kept / "README.md").write_text(about, encoding="utf-8")
    return kept


def _run(
    root: Path,
    request: Request,
    definition: Definition,
    jobs: Mapping[Job, ExperimentConfig],
    waves: list[list[int]],
) -> int:
    from heapr.sweep.collect import Record
    from heapr.sweep.launch import launch, new_folder

    overrides = [list(job) for job in jobs]
    record = Record(
        experiment=definition.name,
        version=request.version,
        command=request.command,
        date=f"{datetime.now():%Y-%m-%d}",
        jobs=overrides,
        waves=waves,
        title=definition.title,
        report=definition.layout(request.version),
    )
    config = next(iter(jobs.values()))
    folder = new_folder(Path(config.paths.outputs) / SWEEPS, record)
    exit_code = launch(folder, request.settings)
    if exit_code:
        logger.error(
            "the process that ran the jobs ended with exit code %d; the same command resumes where it"
            " stopped",
            exit_code,
        )
    failed = _finish(root, request, folder)
    _log_summary(folder, config)
    return max(failed, 1 if exit_code else 0)


def _log_summary(folder: Path, config: ExperimentConfig) -> None:
    """Send the sweep's table, figures and curves to the trackers of its jobs."""
    from heapr.report.sweep.ratio_points import ratio_points
    from heapr.sweep.collect import collect_jobs
    from heapr.tracking.values import log_sweep_summary

    table = (folder / "table.csv").read_text(encoding="utf-8")
    rows = list(csv.DictReader(table.splitlines()))
    log_sweep_summary(
        config.tracking,
        rows,
        folder=folder,
        images=sorted(folder.glob("*.png")),
        curves=ratio_points(collect_jobs(folder)),
        outputs=Path(config.paths.outputs),
    )


def _report_newest(root: Path, request: Request, definition: Definition, jobs: Sequence[Job]) -> int:
    """Report the newest sweep, with the title, tables and figures that the experiment has now."""
    from heapr.sweep.collect import Record, newest_sweep

    (config,) = compose_jobs(definition.name, jobs[:1], root / CONF, request.search_path)
    folder = newest_sweep(Path(config.paths.outputs) / SWEEPS, definition.name, request.version)
    layout = definition.layout(request.version)
    record = replace(Record.read(folder), title=definition.title, report=layout)
    record.write(folder)
    return _finish(root, request, folder)


def _finish(root: Path, request: Request, folder: Path) -> int:
    exit_code, files = _report(root, folder)
    if request.results:
        kept = keep_results(root, folder, files)
        Console(soft_wrap=True).print(f"kept in {kept}", markup=False, highlight=False)
    return exit_code


def _check_settings(settings: Sequence[str], config_folder: Path) -> None:
    """Refuse an unknown launcher, and options that it or the sweeper does not have, before anything runs."""
    register()
    with initialize_config_dir(str(config_folder), version_base="1.3"):
        try:
            composed = compose("config", overrides=[SWEEPER, *settings], return_hydra_config=True)
        except HydraException as error:
            message = str(error).partition("Config search path")[0]
            reason = " ".join(message.removeprefix("In 'hydra/config': ").split())
            if OF_LAUNCHER in reason:
                reason = explain(error, config_folder, settings)
            raise ConfigError(f"{' '.join(settings)}: {reason}") from error
    target = str(composed.hydra.launcher._target_)
    try:
        importlib.import_module(target.rpartition(".")[0])
    except ImportError as error:
        raise ConfigError(explain_launcher(target)) from error


def _help(root: Path) -> None:
    experiments = root / EXPERIMENTS
    command = sweep_command()
    lines = [
        f"{command} experiment=<name> [model=tiny] [overrides] [--dry-run]",
        f"{command} experiment=<name> report_only=true",
        f"{command} report_dir=<folder of a sweep>",
        "",
        "model=tiny       the experiment's version for the built-in model: offline, minutes on 2 cores",
        "overrides        as for run.py; a value that the experiment sweeps selects the jobs that have it,",
        "                 any other applies to all jobs",
        "launcher=        joblib, submitit_local, submitit_slurm or ray (docs/cluster.md); without one, jobs",
        "                 run one after the other",
        "--config-dir     a folder with options of your own, beside those of conf/",
        "--dry-run        show what would be made and stop",
        "report_only=true tables and figures of the experiment's newest sweep, from its artifacts alone",
        "baselines=true   run the experiment's baselines too",
        "results=true     keep tables and figures in experiments/<name>/results",
        "",
    ]
    for name in experiment_names(experiments):
        title = load_definition(experiments, name).title
        lines.append(f"{name:20} {title}")
    console = Console(soft_wrap=True)
    console.print("\n".join(lines), markup=False, highlight=False)
