"""Where values go during a run: always to a JSON-lines file, and to wandb on request.

In: numbers, tables, images and folders by name. Out: lines and charts. Callers use `log` and `close` alone,
whatever the tracker.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

RATIO, NUM_TOKENS = "pruning.ratio", "calibration/tokens"
DENSE, PRUNED, CHANGE = "dense/", "pruned/", "change/"  # beginnings of the names of a run's metrics
CURVE = "curve/"  # beginning of the names of a sweep's curves
FIGURES = "figures/"  # beginning of the names of images
AXES = (RATIO, NUM_TOKENS)  # values that are logged together with one of these are drawn over it


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
    """An artifact of the store: its stage, key and folder."""

    stage: str
    key: str
    path: Path


@dataclass(frozen=True)
class Figure:
    """A figure that is drawn only where images are shown: `draw(path)` writes a PNG and returns its path."""

    draw: Callable[[Path], Path]


Value = float | str | Table | Image | Figure | Folder


@dataclass(frozen=True)
class Run:
    """A run, as trackers know it.

    Attributes:
        name: for people.
        id: of this run alone; a repeat in another folder has another one.
        job_type: "experiment" or "sweep".
        group: name of the sweep; None for a single run.
        tags: short words to filter by.
        config: the whole resolved configuration, and the labels by which tables are grouped.
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
        """Write everything that is pending; nothing can be logged afterwards."""
        ...


class JsonLines:
    """Write one JSON object per line and flush at once, so that a killed run keeps its values."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")

    def log(self, values: Mapping[str, Value]) -> None:
        written = {name: value for name, value in values.items() if not isinstance(value, Figure)}
        row = {"time": round(time.time(), 3), **written}
        self._file.write(json.dumps(row, default=_json) + "\n")
        self._file.flush()

    def close(self, *, succeeded: bool) -> None:
        self._file.close()


class Several:
    """Log everything to several trackers."""

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
