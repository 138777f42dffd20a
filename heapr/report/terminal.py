"""What a terminal is shown by runs and sweeps alike.

In: text and counts. Out: text on the console.
"""

from __future__ import annotations

import sys

from rich.console import Console
from rich.text import Text

UNLIMITED = 10_000  # columns


def open_console() -> Console:
    """Standard output; into a file or pipe, where nobody sees the width of a screen, tables are as wide as
    they need to be."""
    return Console() if sys.stdout.isatty() else Console(width=UNLIMITED)


def print_lines(console: Console, text: str, style: str = "") -> None:
    """Lines that are broken nowhere: a path must be whole for whoever copies it or a program that reads
    it."""
    console.print(Text(text, style=style), soft_wrap=True)


def operations(flops: int) -> str:
    """With four digits, never as a power of ten."""
    size, unit = next(
        ((size, unit) for size, unit in ((1e12, "TFLOPs"), (1e9, "GFLOPs")) if flops >= size), (1e6, "MFLOPs")
    )
    number = flops / size
    return f"{number:,.0f} {unit}" if number >= 1000 else f"{number:.4g} {unit}"
