"""Answers a mistake on a command line in one line.

In: whatever parses arguments with argparse, Hydra too. Out: a `ConfigError` in place of argparse's several
lines.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn
from unittest import mock

from heapr.errors import ConfigError


@contextmanager
def one_line_arguments(command: str) -> Iterator[None]:
    """Inside the context, every parser raises its mistakes, those of libraries included.

    Args:
        command: that lists its options with --help.

    Raises:
        ConfigError: the arguments are wrong.
    """

    def refuse(parser: argparse.ArgumentParser, message: str) -> NoReturn:
        raise ConfigError(f"{message}; {command} --help lists the options")

    with mock.patch.object(argparse.ArgumentParser, "error", refuse):
        yield
