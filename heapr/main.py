"""Connects the command line to the pipeline: one line for the user's mistakes, and the final table.

In: the configuration that Hydra composed, or the error that it raised. Out: a run, or one line on stderr and
exit code 2.
"""

from __future__ import annotations

import io
import logging
import os
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from heapr.artifacts import clear_error, write_error
from heapr.errors import ConfigError
from heapr.overrides import check_one_option, explain_comma, explain_option, explain_override, options_of
from heapr.schema import ExperimentConfig, register, resolve
from heapr.words import did_you_mean, first_line, unknown_key

logger = logging.getLogger(__name__)

EXIT_CODE = 2


def run_job(config: DictConfig) -> None:
    """Run one job. In a sweep, a mistake fails only its own job, and Hydra continues with the others."""
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        with _recorded_failure(Path(HydraConfig.get().runtime.output_dir)):
            _run(config)
        return
    with one_line_errors():  # here, because Hydra would add a line of its own
        _run(config)


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
        write_error(folder, line)
        raise


def _run(config: DictConfig) -> None:
    """Check the configuration; then run the pipeline, or predict what it would do, and print the tables."""
    check_one_option(list(HydraConfig.get().overrides.task))
    typed = resolve(config)  # before torch is imported, so that a mistake is answered at once
    if typed.dry_run:
        from heapr.dry_run import dry_run
        from heapr.report.run.dry_run_table import print_dry_run

        print_dry_run(asdict(dry_run(typed)))
        return
    from heapr.pipeline import run
    from heapr.report.run.console import print_summary

    hydra = HydraConfig.get()
    folder = Path(hydra.runtime.output_dir)
    sweep = Path(hydra.sweep.dir).resolve().name if hydra.mode == RunMode.MULTIRUN else None
    summary = run(typed, folder, sweep=sweep)
    print_summary(asdict(summary), str(folder))


# How messages of omegaconf and Hydra begin:
FIELD_OF_NOTHING = "Unexpected type for root: NoneType"  # an override sets a field of null
OPTION_WITHOUT_NAME = "Config group override must be a string or a list"  # score=3
COMMA_OUTSIDE_SWEEP = "Ambiguous value for argument"  # a=1,2
UNREADABLE_VALUE = "Error merging override"  # a value of the wrong type

USED_WITH = {  # groups whose options are chosen inside other groups
    "corpus": "calibration=<name> to calibrate on one, evaluation/corpora=[<name>,...] to measure on some",
    "calibration/parts": "calibration=mixture 'calibration/parts@calibration.corpus.parts=[<name>,...]'",
    "evaluation/evaluators": "'evaluation/evaluators@evaluation=[<name>,...]'",
}


@contextmanager
def one_line_errors(config_folder: Path | None = None) -> Iterator[None]:
    """Turn a user's mistake into one line and exit code 2.

    Every other error is a bug of ours and keeps its stack trace.

    Args:
        config_folder: used to look up known keys when one is misspelled.
    """
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # otherwise Hydra prints errors itself and exits with 1
    print_whatever_the_encoding()
    try:
        yield
    except ConfigError as error:
        _stop(str(error))
    except FloatingPointError as error:
        _stop(str(error), code=1)
    except (HydraException, OmegaConfBaseException) as error:
        _stop(explain(error, config_folder, sys.argv[1:]))
    except ValueError as error:
        if not str(error).startswith(OPTION_WITHOUT_NAME) or config_folder is None:
            raise
        _stop(explain_option(sys.argv[1:], config_folder))
    except AssertionError as error:
        if not str(error).startswith(FIELD_OF_NOTHING):
            raise
        _stop(
            "an override sets a field of something that is null, such as pruning.repair.ridge; choose it"
            " first, for example pruning/repair=joint"
        )
    except OSError as error:
        if error.filename is None or _came_from_job(error):
            raise
        _stop(
            f"cannot write '{error.filename}': {error.strerror}; choose another folder with paths.outputs=..."
        )


def print_whatever_the_encoding() -> None:
    """Let the console print an escape for every letter that its encoding lacks.

    Otherwise an unusual letter in a path would fail a run that has just finished.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _stop(message: str, code: int = EXIT_CODE) -> None:
    sys.stderr.write(f"error: {message}\n")
    sys.exit(code)


def _came_from_job(error: BaseException) -> bool:
    """Whether the error was raised in the job. If not, Hydra could not make the run's folder."""
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_code is _run.__code__ for frame, _ in frames)


def explain(error: Exception, config_folder: Path | None, overrides: Sequence[str]) -> str:
    """Hydra's message, or a better one if a key is misspelled or a value has the wrong type.

    Args:
        error: what Hydra raised when it composed the configuration.
        config_folder: used to look up known keys.
        overrides: arguments of the command line.
    """
    text = str(error).strip()
    if isinstance(error, OverrideParseException):
        return _explain_unparsed(error.override, text, overrides)
    if text.startswith(COMMA_OUTSIDE_SWEEP):
        quoted = text.splitlines()[0].removeprefix(COMMA_OUTSIDE_SWEEP).strip()
        return explain_comma(quoted[1:-1])
    match = re.match(r"Could not override '([^']+)'", text)
    if match and config_folder is not None:
        return _explain_unmatched(match[1], text, config_folder, overrides)
    match = re.search(r"Could not (?:find|load) '([^']+)'", text)
    if match and config_folder is not None and (config_folder / match[1]).parent.is_dir():
        return _unknown_option(match[1], config_folder)
    if text.startswith(UNREADABLE_VALUE) and error.__cause__ is not None:
        which = text.removeprefix(UNREADABLE_VALUE).removeprefix(" ")
        reason = first_line(error.__cause__)
        return f"{which}: {reason}; give a value of the field's type (heapr/schema.py)"
    return text


def _explain_unparsed(override: str, text: str, overrides: Sequence[str]) -> str:
    """The message for an override that Hydra cannot parse, or whose function, such as int(x), fails."""
    evaluated = [line for line in text.splitlines() if "while evaluating" in line]
    if evaluated:
        return f"argument '{override}': {evaluated[0]}"
    return explain_override(override, overrides)


def _explain_unmatched(path: str, text: str, config_folder: Path, overrides: Sequence[str]) -> str:
    """The message for a key that is not in the configuration, or a group that is used inside others."""
    if path in USED_WITH:
        return f"options of '{path}' are chosen where they are used; write {USED_WITH[path]}"
    is_unknown_key = "To append to your config" in text
    return _explain_unknown_key(path, config_folder, overrides) if is_unknown_key else text


def _unknown_option(path: str, config_folder: Path) -> str:
    """The message for a misspelled option of a group."""
    group, _, option = path.rpartition("/")
    known = options_of(group, config_folder)
    suggestion = did_you_mean(option, known)
    return f"unknown option '{path}'; {suggestion}known options of {group}: {', '.join(known)}"


def _explain_unknown_key(path: str, config_folder: Path, overrides: Sequence[str]) -> str:
    """The message for a misspelled key, compared part by part with the options that were chosen."""
    node = _compose_groups(overrides, config_folder)
    parts = path.split(".")
    for number, part in enumerate(parts, start=1):
        if not isinstance(node, DictConfig) or part not in node:
            known = [str(key) for key in node] if isinstance(node, DictConfig) else []
            return unknown_key(".".join(parts[:number]), known)
        node = node[part]
    return f"'{path}' is not a field that can be set; see --help"


def compose_experiment(overrides: Sequence[str], config_folder: Path) -> ExperimentConfig:
    """The checked configuration of `python run.py <overrides>`.

    Raises:
        ConfigError, HydraException: the overrides are wrong.
    """
    register()
    check_one_option(overrides)
    with initialize_config_dir(str(config_folder), version_base="1.3"):
        return resolve(compose("config", overrides=list(overrides)))


def _compose_groups(overrides: Sequence[str], config_folder: Path) -> DictConfig:
    """The configuration with the first option chosen for each group, and no other override."""
    matches = [re.fullmatch(r"([a-z_/]+)=([a-z_0-9]+)(,.*)?", override) for override in overrides]
    choices = [f"{match[1]}={match[2]}" for match in matches if match]
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_folder), version_base="1.3"):
        try:
            return compose("config", overrides=choices)
        except HydraException:  # one of them is misspelled itself
            return compose("config")
