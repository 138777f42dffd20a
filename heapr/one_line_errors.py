"""Ends a command after a mistake of the user's: one line on stderr, and an exit code.

In: whatever was raised while the command ran. Out: exit code 2 after a mistake, 1 after numbers that are not
finite, a rank's own after the end of another one. Other errors are bugs and keep their stack trace.
"""

from __future__ import annotations

import io
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from heapr.composition import checked_compositions
from heapr.errors import ConfigError, RankEnded
from heapr.explain import explain, explain_builtin
from heapr.os_errors import NO_SPACE
from heapr.secrets import without_secrets
from heapr.signals import one_line_ends
from heapr.unread_output import until_nobody_reads

EXIT_CODE = 2
# What Hydra, OmegaConf and PyYAML let through.
BUILTIN = (ValueError, RuntimeError, AssertionError, AttributeError, KeyError, YAMLError)
# On the command line: the stack trace of a mistake too.
DEBUG = "debug=true"
# The attribute that marks an error of the operating system as the job's.
OF_JOB = "is_of_heapr_job"


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
        with one_line_ends(), explained(config_folder), checked_compositions(), until_nobody_reads():
            yield
    except RankEnded as end:
        _stop(end.line, code=end.code)
    except ConfigError as error:
        _stop(str(error), error=error)
    except FloatingPointError as error:
        _stop(str(error), code=1, error=error)


@contextmanager
def explained(config_folder: Path | None = None) -> Iterator[None]:
    """Turn errors of Hydra, OmegaConf and transformers that are the user's mistakes into `ConfigError`.

    Args:
        config_folder: as in `one_line_errors`.

    Raises:
        ConfigError: a mistake.
    """
    try:
        yield
    except ConfigError:
        raise
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(error, config_folder, sys.argv[1:])) from error
    except BUILTIN as error:
        message = explain_builtin(error, config_folder)
        if message is None:
            raise
        raise ConfigError(message) from error
    except OSError as error:
        message = explain_builtin(error, config_folder) if error.errno is None else None
        if message is not None:
            raise ConfigError(message) from error
        is_space = error.errno in NO_SPACE
        if hasattr(error, OF_JOB) or (error.filename is None and not is_space):
            raise
        what = "the run's folder" if error.filename is None else f"'{error.filename}'"
        raise ConfigError(
            f"cannot write {what}: {error.strerror}; choose another folder with paths.outputs=..., or, if all"
            " results are there already, another one for the run's own files with hydra.run.dir=..."
        ) from error


@contextmanager
def marked_as_of_job() -> Iterator[None]:
    """Mark errors of the operating system that are raised inside: they are the job's.

    `explained` says of all others that Hydra could not make the run's folder. The mark is an attribute, so it
    stays when a launcher sends the error from another process.
    """
    try:
        yield
    except OSError as error:
        setattr(error, OF_JOB, True)
        raise


def print_whatever_the_encoding() -> None:
    """Let the console print an escape for every letter that its encoding lacks.

    Otherwise an unusual letter in a path would fail a run that has just finished.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _stop(message: str, code: int = EXIT_CODE, error: BaseException | None = None) -> None:
    """End the process; an empty message has been told by another one."""
    if message:
        if error is not None and not {DEBUG, f"++{DEBUG}"}.isdisjoint(sys.argv):
            sys.stderr.write(without_secrets("".join(traceback.format_exception(error))))
        line = " ".join(message.split())  # what a library or a file said may hold the ends of lines
        sys.stderr.write(f"error: {without_secrets(line)}\n")
        sys.stderr.flush()
    sys.exit(code)
