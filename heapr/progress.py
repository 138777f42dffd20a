"""The one progress bar: rate and time left, on a terminal live, in a log file a line now and then."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from tqdm import tqdm

Item = TypeVar("Item")
LOG_INTERVAL_SECONDS = 30.0


def progress(items: Iterable[Item], *, total: int, description: str, unit: str = "batch") -> Iterator[Item]:
    """Yield the items and show how far we are."""
    with tqdm(items, total=total, desc=description, unit=unit, **bar_settings()) as bar:
        yield from bar


def bar_settings() -> dict[str, Any]:
    """tqdm's arguments that make a bar ours."""
    live = sys.stderr.isatty()
    interval = 0.1 if live else LOG_INTERVAL_SECONDS
    return {"mininterval": interval, "leave": False, "delay": 0 if live else interval}
