"""What runs and sweeps show beside their metrics: calibration's progress, layers, figures and the comparison
table.

In: numbers, rows and files. Out: values that a tracker takes.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from heapr.schema import TrackingConfig
from heapr.tracking.open_tracker import open_tracker
from heapr.tracking.tracker import FIGURES, NUM_TOKENS, Folder, Image, Run, Table, Tracker

PROGRESS_SECONDS = 1.0
LAYER_COLUMNS = (
    "layer",
    "kept_ratio",
    "atomic_experts_before",
    "atomic_experts",
    "narrowest",
    "widest",
    "empty_experts",
    "most_routed",
)


class CalibrationProgress:
    """Called after every batch; logs speed and loss at most once a second.

    Args:
        tracker: gets them, over the number of tokens.
        clock: seconds.
    """

    def __init__(self, tracker: Tracker, clock: Callable[[], float] = time.monotonic) -> None:
        self._tracker, self._clock = tracker, clock
        self._started = self._logged = clock()

    def __call__(self, num_tokens: int, loss: float) -> None:
        """So many tokens are done; their mean loss, in nats per predicted token."""
        now = self._clock()
        if now - self._logged >= PROGRESS_SECONDS:
            self._logged = now
            speed = num_tokens / (now - self._started)
            self._tracker.log(
                {NUM_TOKENS: num_tokens, "calibration/loss": loss, "calibration/tokens_per_second": speed}
            )


def layer_table(layers: Iterable[Mapping[str, Any]]) -> Table:
    """One row per layer, of what `heapr.evaluation.routing.layer_routing` says of it.

    Columns: decoder layer index, share kept, atomic experts before and after, the least and most that an
    expert keeps, experts that keep none, and the share of tokens that goes to the expert with most.
    """
    rows = [
        [
            layer["layer"],
            layer["layer_kept_ratio"],
            sum(layer["widths_before"]),
            sum(layer["widths"]),
            min(layer["widths"]),
            max(layer["widths"]),
            sum(width == 0 for width in layer["widths"]),
            max(layer["routing_frequency"]),
        ]
        for layer in layers
    ]
    return Table(LAYER_COLUMNS, rows)


def figures(paths: Iterable[Path]) -> dict[str, Image]:
    """PNG files by what they are logged as."""
    return {f"{FIGURES}{path.stem}": Image(path) for path in paths}


def artifacts(stages: Iterable[Mapping[str, Any]]) -> dict[str, Folder]:
    """The folders of a run's stages, as in its summary, by what they are logged as."""
    folders = [Folder(stage["stage"], stage["key"], Path(stage["path"])) for stage in stages]
    return {f"artifacts/{folder.stage}-{folder.key}": folder for folder in folders}


def log_sweep_summary(
    settings: TrackingConfig,
    rows: Sequence[Mapping[str, Any]],
    *,
    folder: Path,
    images: Sequence[Path],
    outputs: Path,
) -> None:
    """One run in a sweep's group, with its comparison table and figures; a repeat updates it.

    Args:
        settings: as of the jobs.
        rows: of the table: cell by column; what a row lacks stays empty.
        folder: of the sweep, whose name is the group's; gets the JSON-lines file.
        images: PNG files.
        outputs: gets wandb's folder.

    Raises:
        ConfigError: wandb is to be online without a key.
    """
    columns = list(dict.fromkeys(column for row in rows for column in row))
    table = Table(columns, [[row.get(column) for column in columns] for row in rows])
    name = folder.resolve().name
    run = Run(
        name=f"{name} summary",
        id=hashlib.sha256(f"sweep {name}".encode()).hexdigest()[:16],
        job_type="sweep",
        group=name,
        tags=("summary",),
        config={"sweep": name, "jobs": len(rows)},
    )
    with open_tracker(settings, run, folder=folder, outputs=outputs) as tracker:
        tracker.log({"comparison": table, **figures(images)})
