"""The command line: in a process of its own, or in this one, where nothing has to be imported again."""

from __future__ import annotations

import io
import logging
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

ROOT = Path(__file__).parents[1]

Completed = subprocess.CompletedProcess[str]


def run_py(*arguments: str, folder: Path, **variables: str) -> Completed:
    """`python run.py <arguments>` in a folder, in a process of its own."""
    command = [sys.executable, str(ROOT / "run.py"), *arguments]
    environment = {**os.environ, **variables}
    decoded = {"encoding": "utf-8", "errors": "backslashreplace"}  # a test may ask for another encoding
    return subprocess.run(
        command, capture_output=True, cwd=folder, env=environment, timeout=120, check=False, **decoded
    )


def run_py_here(*arguments: str, folder: Path) -> Completed:
    """The same in this process; a stack trace becomes an exception."""
    return run_here([sys.executable, str(ROOT / "run.py"), *arguments], folder)


def run_here(command: Sequence[str], folder: Path) -> Completed:
    """What a Python script or a module (after -m) does, prints and exits with; logging, Hydra and environment
    are left as they were."""
    _, script, *arguments = command
    if script == "-m":
        module, *arguments = arguments
    stdout, stderr, code = io.StringIO(), io.StringIO(), 0
    with (
        redirect_stdout(stdout),
        redirect_stderr(stderr),
        _as_it_was(),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.chdir(folder)
        patch.setattr(sys, "argv", [script, *arguments])
        try:
            if script == "-m":
                runpy.run_module(module, run_name="__main__")
            else:
                runpy.run_path(script, run_name="__main__")
        except SystemExit as stopped:
            code = 0 if stopped.code is None else int(stopped.code)
    return Completed(command, code, stdout.getvalue(), stderr.getvalue())


@contextmanager
def _as_it_was() -> Iterator[None]:
    """Put back what Hydra exchanges for good in a process that runs one job: handlers, levels, singletons."""
    loggers = [logging.getLogger(name) for name in (None, "heapr")]
    before = [(logger, logger.level, logger.handlers[:]) for logger in loggers]
    GlobalHydra.instance().clear()
    try:
        with mock.patch.dict(os.environ):
            yield
    finally:
        HydraConfig.instance().cfg = None
        for logger, level, handlers in before:
            for handler in set(logger.handlers) - set(handlers):
                handler.close()
            logger.handlers[:] = handlers
            logger.setLevel(level)
