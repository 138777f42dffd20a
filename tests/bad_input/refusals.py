"""What every entry point must do with wrong input: exit code 2 and one line; asked for in this process."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest import mock

from heapr.main import one_line_errors
from tests.command import Completed, run_py_here
from tests.experiment import CONF

LOG_LINE = re.compile(r"\d\d:\d\d:\d\d INFO |here  |missing  ")  # of work that came before
LONGEST = 900  # letters of a message; known names may be listed


def line_of(result: Completed) -> str:
    """The line of a refusal."""
    assert result.returncode == 2, (result.returncode, result.stdout[-500:], result.stderr[-3000:])
    *log, line = result.stderr.strip().splitlines()
    assert all(LOG_LINE.match(before) for before in log), result.stderr
    assert line.startswith("error: ") and "Traceback" not in result.stderr
    assert len(line) < LONGEST, line
    return line


def refused(folder: Path, *arguments: str) -> str:
    """The line with which `python run.py <arguments>` refuses."""
    with weights_stay_away(), composed_once(arguments):
        return line_of(run_py_here(*arguments, folder=folder))


def refused_call(call: Callable[[], object]) -> str:
    """The line with which a command that consists of this call would refuse."""
    stderr, code = io.StringIO(), 0
    with weights_stay_away(), contextlib.redirect_stderr(stderr):
        try:
            with one_line_errors(CONF):
                call()
        except SystemExit as stopped:
            code = int(stopped.code or 0)
    return line_of(Completed([], code, "", stderr.getvalue()))


def composed_once(arguments: Sequence[str]) -> contextlib.AbstractContextManager[object]:
    """Inside the context, Hydra does not compose once more to see whether a file asks for a sweep."""
    if "-m" in arguments:
        return contextlib.nullcontext()
    return mock.patch("hydra._internal.hydra.Hydra.get_mode", return_value=None)


@contextlib.contextmanager
def weights_stay_away() -> Iterator[None]:
    """Inside the context, loading a model fails the test: a mistake must be found before."""
    accepted = AssertionError("was accepted")
    with (
        mock.patch("heapr.model.load.ModelSource._load_weights", side_effect=accepted),
        mock.patch("torch.set_num_threads"),
    ):
        yield
