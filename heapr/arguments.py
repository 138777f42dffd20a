"""A parser of command lines that answers a mistake in one line.

In: arguments. Out: their values, or a `ConfigError` in place of argparse's several lines.
"""

from __future__ import annotations

import argparse
from typing import NoReturn

from heapr.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """argparse's parser, whose mistakes are ours to print; parsers of subcommands are of this class too."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; {self.prog} --help lists the options")
