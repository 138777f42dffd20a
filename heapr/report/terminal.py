"""Output on a terminal, for runs and sweeps alike.

In: text and counts. Out: text on the console.
"""

from __future__ import annotations

import sys

from rich.console import Console
from rich.text import Text

UNLIMITED = 10_000  # columns


def open_console() -> Console:
    """Return standard output as a console; in a file or pipe, tables are as wide as they need to be."""
    return Console() if sys.stdout.isatty() else Console(width=UNLIMITED)


def print_lines(console: Console, text: str, style: str = "") -> None:
    """Print lines without breaking them, so that people and programs can copy whole paths."""
    console.print(Text(text, style=style), soft_wrap=True)


def operations(flops: int) -> str:
    """Return a number of operations with four digits and its unit, never as a power of ten."""
    size, unit = 1e6, "MFLOPs"
    if flops >= 1e12:
        size, unit = 1e12, "TFLOPs"
    elif flops >= 1e9:
        size, unit = 1e9, "GFLOPs"
    number = flops / size
    return f"{number:,.0f} {unit}" if number >= 1000 else f"{number:.4g} {unit}"
