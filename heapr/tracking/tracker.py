"""Where metrics go while a run is under way: always a JSON-lines file, and wandb beside it if asked.

In: numbers by name. Out: lines and charts. Call sites know `log` and `close` and never ask which tracker it is.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol


class Tracker(Protocol):
    def log(self, values: Mapping[str, Any]) -> None:
        """Record values under their contract names."""
        ...

    def close(self, *, succeeded: bool) -> None:
        """Write what is left; nothing is recorded afterwards."""
        ...


class JsonLines:
    """One JSON object a line, flushed at once, so that a killed run keeps what it had."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")

    def log(self, values: Mapping[str, Any]) -> None:
        self._file.write(json.dumps({"time": round(time.time(), 3), **values}) + "\n")
        self._file.flush()

    def close(self, *, succeeded: bool) -> None:
        self._file.close()


class Several:
    """Every tracker gets everything."""

    def __init__(self, *trackers: Tracker) -> None:
        self._trackers = trackers

    def log(self, values: Mapping[str, Any]) -> None:
        for tracker in self._trackers:
            tracker.log(values)

    def close(self, *, succeeded: bool) -> None:
        for tracker in self._trackers:
            tracker.close(succeeded=succeeded)
