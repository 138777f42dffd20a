"""The one progress bar: rate and time left, live on a terminal, now and then as a line in a log file."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from tqdm import tqdm

Item = TypeVar("Item")
LOG_INTERVAL_SECONDS = 30.0


def progress(
    items: Iterable[Item],
    *,
    total: int,
    description: str,
    unit: str = "batch",
    remark: Callable[[], str] | None = None,
) -> Iterator[Item]:
    """Yield the items and show the progress, with a remark that is asked for after each item."""
    with tqdm(items, total=total, desc=description, unit=unit, **bar_settings()) as bar:
        for item in bar:
            yield item
            if remark is not None:
                bar.set_postfix_str(remark(), refresh=False)


@contextmanager
def counted(total: int, description: str, unit: str = "pass") -> Iterator[Callable[[str], None]]:
    """Show the progress of work that is no loop; yields a function that counts a step, with a remark."""
    with tqdm(total=total, desc=description, unit=unit, **bar_settings()) as bar:

        def count(remark: str) -> None:
            bar.set_postfix_str(remark, refresh=False)
            bar.update()

        yield count


def bar_settings() -> dict[str, Any]:
    """Arguments of tqdm that all bars share."""
    is_terminal = sys.stderr.isatty()
    interval = 0.1 if is_terminal else LOG_INTERVAL_SECONDS
    delay = 0 if is_terminal else LOG_INTERVAL_SECONDS
    return {"mininterval": interval, "leave": False, "delay": delay}
