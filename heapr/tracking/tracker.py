"""Where values go while a run is under way: always a JSON-lines file, and wandb beside it if asked.

In: numbers, tables, images and folders by name. Out: lines and charts. Call sites know `log` and `close` and
never ask which tracker it is.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

RATIO, NUM_TOKENS = "pruning.ratio", "calibration/tokens"
FIGURES = "figures/"  # how the names of images begin
AXES = (RATIO, NUM_TOKENS)  # what is logged together with one of these is drawn over it


@dataclass(frozen=True)
class Table:
    """Rows of cells, one cell for each column."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclass(frozen=True)
class Image:
    """A PNG file."""

    path: Path


@dataclass(frozen=True)
class Folder:
    """An artifact of the store: what it is, and where."""

    stage: str
    key: str
    path: Path


Value = float | str | Table | Image | Folder


@dataclass(frozen=True)
class Run:
    """What a tracker calls a run.

    Attributes:
        name: readable.
        id: the same for the same experiment, so that a repeat updates its run.
        job_type: "experiment" or "sweep".
        group: name of the sweep; none for a single run.
        tags: short words to filter by.
        config: the whole resolved configuration, and what tables are grouped by.
    """

    name: str
    id: str
    job_type: str
    group: str | None
    tags: Sequence[str]
    config: Mapping[str, Any]


class Tracker(Protocol):
    def log(self, values: Mapping[str, Value]) -> None:
        """Record values under their contract names."""
        ...

    def close(self, *, succeeded: bool) -> None:
        """Write what is left; nothing is recorded afterwards."""
        ...


class JsonLines:
    """One JSON object a line, flushed at once, so that a killed run keeps what it had."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")

    def log(self, values: Mapping[str, Value]) -> None:
        self._file.write(json.dumps({"time": round(time.time(), 3), **values}, default=_json) + "\n")
        self._file.flush()

    def close(self, *, succeeded: bool) -> None:
        self._file.close()


class Several:
    """Every tracker gets everything."""

    def __init__(self, *trackers: Tracker) -> None:
        self._trackers = trackers

    def log(self, values: Mapping[str, Value]) -> None:
        for tracker in self._trackers:
            tracker.log(values)

    def close(self, *, succeeded: bool) -> None:
        for tracker in self._trackers:
            tracker.close(succeeded=succeeded)


def _json(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else asdict(value)
