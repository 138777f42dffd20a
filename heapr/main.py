"""The command line `heapr`, `python -m heapr` or `python run.py`: Hydra's entry, and the final table.

In: arguments, from which Hydra composes a configuration. Out: a run, or one line on stderr and exit code 2
(heapr/one_line_errors.py).
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from heapr.arguments import one_line_arguments
from heapr.artifacts import clear_error, write_error
from heapr.definitions import conf_folder, run_command
from heapr.errors import ConfigError
from heapr.inputs import check_inputs
from heapr.one_line_errors import explained, marked_as_of_job, one_line_errors
from heapr.overrides import check_one_option, options_first
from heapr.ranks import Ranks
from heapr.saved_run import with_saved_run
from heapr.schema import register, resolve
from heapr.secrets import without_secrets
from heapr.signals import end_with_parent, end_worker_with_parent
from heapr.start_ranks import started_ranks
from heapr.words import first_line

logger = logging.getLogger(__name__)

WITHOUT_FOLDER = ["hydra.run.dir=.", "hydra.output_subdir=null"]
OPTIONS_OF_OTHERS = [*WITHOUT_FOLDER, "hydra/job_logging=rank"]
OPTIONS_OF_DRY_RUNS = [*WITHOUT_FOLDER, "hydra/job_logging=console"]


def main() -> None:
    """Do what the command line asks, and exit with 2 after a mistake of the user's."""
    register()
    end_with_parent()
    conf = conf_folder()
    with one_line_errors(conf), started_ranks() as ranks, explained(conf):
        arguments = with_saved_run(options_first(sys.argv[1:]), conf)
        sys.argv[1:] = arguments + options_of_rank(ranks, sys.argv[1:])
        _run_hydra(conf, ranks)


def _run_hydra(conf: Path, ranks: Ranks) -> None:
    """Let Hydra compose the configuration, or those of a sweep, and call us back with it."""
    started = os.getpid()

    @hydra.main(version_base="1.3", config_path=str(conf), config_name="config")
    def job(config: DictConfig) -> float | None:
        if os.getpid() != started:  # in a launcher's process, to which this function was sent
            end_worker_with_parent()
        return run_job(config, ranks)

    with one_line_arguments(run_command()):
        job()


def options_of_rank(ranks: Ranks, arguments: Sequence[str]) -> list[str]:
    """What the command line is given besides what it has: ranks but the first and dry runs have no folder.

    Raises:
        ConfigError: several processes would run a sweep.
    """
    is_sweep = not {"-m", "--multirun"}.isdisjoint(arguments)
    if ranks.size > 1 and is_sweep:
        raise ConfigError(
            f"{ranks.size} processes cannot share the jobs of run.py -m; start one process, and give it a"
            " launcher (docs/cluster.md), or several processes for a single job"
        )
    if not ranks.is_first:
        return OPTIONS_OF_OTHERS
    is_dry_run = "dry_run=true" in [argument.lstrip("+").lower() for argument in arguments]
    return OPTIONS_OF_DRY_RUNS if is_dry_run and not is_sweep else []


def run_job(config: DictConfig, ranks: Ranks) -> float | None:
    """Run one job. In a sweep, a mistake fails only its own job, and Hydra continues with the others.

    Returns:
        the metric that `objective` names, for a sweeper; None without an objective.
    """
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        with _recorded_failure(Path(HydraConfig.get().runtime.output_dir)), marked_as_of_job():
            return _run(config, ranks)
    # Here too, because Hydra would add a line of its own.
    with one_line_errors(), ranks.together(), marked_as_of_job():
        return _run(config, ranks)


@contextmanager
def _recorded_failure(folder: Path) -> Iterator[None]:
    """Write why a job failed into its folder; log the stack trace unless it was the user's mistake."""
    clear_error(folder)
    try:
        yield
    except Exception as error:
        line = first_line(error)
        if isinstance(error, ConfigError | FloatingPointError):
            logger.error("this job failed: %s", line)
        else:
            line = f"{type(error).__name__}: {line}"
            logger.error("this job failed: %s", line, exc_info=error)
        write_error(folder, without_secrets(line))
        raise


def _run(config: DictConfig, ranks: Ranks) -> float | None:
    """Check the configuration; then run the pipeline, or predict what it would do, and print the tables."""
    check_one_option(list(HydraConfig.get().overrides.task))
    typed = resolve(config)  # before torch is imported, so that a mistake is answered at once
    # A dry run says what is missing, and goes on.
    check_inputs(asdict(typed), texts=not typed.dry_run)
    ranks.check_same("configuration", flat(asdict(typed)))
    if typed.dry_run:
        if not ranks.is_first:
            return None
        from heapr.dry_run import dry_run
        from heapr.report.run.dry_run_table import print_dry_run

        print_dry_run(asdict(dry_run(typed)))
        return None
    from heapr.objective import objective_value
    from heapr.report.run.console import print_summary
    from heapr.run_experiment import run

    hydra = HydraConfig.get()
    folder = Path(hydra.runtime.output_dir)
    sweep = Path(hydra.sweep.dir).resolve().name if hydra.mode == RunMode.MULTIRUN else None
    summary = run(typed, folder, sweep=sweep, ranks=ranks)
    if ranks.is_first:
        print_summary(asdict(summary), str(folder))
    return objective_value(typed.objective, summary.metrics)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested mappings by their full names, as on the command line."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


if __name__ == "__main__":
    main()
