"""What runs and sweeps log beside their metrics: progress of calibration, layers, figures, the comparison.

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
from heapr.tracking.tracker import (
    CHANGE,
    CURVE,
    FIGURES,
    NUM_TOKENS,
    PRUNED,
    RATIO,
    Folder,
    Image,
    Run,
    Table,
    Tracker,
    Value,
)

PROGRESS_SECONDS = 1.0
ID_LENGTH = 16
NOT_COMPARED = ("_stderr", "num_tokens")  # ends of kinds of metrics whose change says nothing
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


def run_id(*parts: str) -> str:
    """Return an id for a run, the same for the same parts."""
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:ID_LENGTH]


def results(metrics: Mapping[str, Mapping[str, float]], ratio: float) -> dict[str, Value]:
    """Return a run's metrics by the names under which they are logged, over the ratio.

    `pruned/<metric>`, and `change/<metric>`, by how much it differs from the dense model's, as a share of the
    dense model's: runs are sorted by damage with it. Sizes and comparisons keep their names.

    Args:
        metrics: of the run, by group, as in its summary.
        ratio: that was asked for.
    """
    dense, pruned = metrics["dense"], metrics["pruned"]
    changes: dict[str, Value] = {}
    for name, value in pruned.items():
        is_quantity = not name.partition("/")[0].endswith(NOT_COMPARED)
        if is_quantity and dense.get(name):
            changes[f"{CHANGE}{name}"] = (value - dense[name]) / abs(dense[name])
    named = under(PRUNED, pruned)
    return {RATIO: ratio, **named, **changes, **metrics["size"], **metrics["comparison"]}


def under(beginning: str, metrics: Mapping[str, float]) -> dict[str, Value]:
    """Return metrics under names with a beginning, such as the model that they are of."""
    return {f"{beginning}{name}": value for name, value in metrics.items()}


class CalibrationProgress:
    """Log speed and loss of calibration, at most once a second.

    Args:
        tracker: logs them over the number of tokens.
        clock: returns seconds.
    """

    def __init__(self, tracker: Tracker, clock: Callable[[], float] = time.monotonic) -> None:
        self._tracker, self._clock = tracker, clock
        self._started = self._logged = clock()

    def __call__(self, num_tokens: int, loss: float) -> None:
        """Report progress after a batch.

        Args:
            num_tokens: processed so far.
            loss: their mean, in nats per predicted token.
        """
        now = self._clock()
        if now - self._logged >= PROGRESS_SECONDS:
            self._logged = now
            speed = num_tokens / (now - self._started)
            self._tracker.log(
                {NUM_TOKENS: num_tokens, "calibration/loss": loss, "calibration/tokens_per_second": speed}
            )


def layer_table(layers: Iterable[Mapping[str, Any]]) -> Table:
    """Return a table with one row per layer.

    Columns: decoder layer index, share kept, atomic experts before and after, the least and the most that an
    expert keeps, number of empty experts, and the share of tokens that the most used expert gets.

    Args:
        layers: as returned by `heapr.evaluation.routing.layer_routing`.
    """
    rows = [_layer_row(layer) for layer in layers]
    return Table(LAYER_COLUMNS, rows)


def _layer_row(layer: Mapping[str, Any]) -> list[Any]:
    widths = list(layer["widths"])
    return [
        layer["layer"],
        layer["layer_kept_ratio"],
        sum(layer["widths_before"]),
        sum(widths),
        min(widths),
        max(widths),
        widths.count(0),
        max(layer["routing_frequency"]),
    ]


def figures(paths: Iterable[Path]) -> dict[str, Image]:
    """Return PNG files by the names under which they are logged."""
    return {f"{FIGURES}{path.stem}": Image(path) for path in paths}


def artifacts(stages: Iterable[Mapping[str, Any]]) -> dict[str, Folder]:
    """Return the folders of a run's stages, as in its summary, by the names under which they are logged."""
    folders = [Folder(stage["stage"], stage["key"], Path(stage["path"])) for stage in stages]
    return {f"artifacts/{folder.stage}-{folder.key}": folder for folder in folders}


def log_sweep_summary(
    settings: TrackingConfig,
    rows: Sequence[Mapping[str, Any]],
    *,
    folder: Path,
    images: Sequence[Path],
    curves: Mapping[float, Mapping[str, float]],
    outputs: Path,
) -> None:
    """Log a sweep's comparison table, figures and curves as a run in its group; a repeat updates that run.

    Args:
        settings: of tracking, as for the jobs.
        rows: of the table: cells by column; missing cells stay empty.
        folder: of the sweep; its name is the group's, and it gets the JSON-lines file.
        images: PNG files.
        curves: numbers by ratio and by the name of their line.
        outputs: gets wandb's folder.

    Raises:
        ConfigError: wandb must be online but there is no key.
    """
    columns = list(dict.fromkeys(column for row in rows for column in row))
    cells = [list(map(row.get, columns)) for row in rows]
    table = Table(columns, cells)
    name = folder.resolve().name
    run = Run(
        name=f"{name} summary",
        id=run_id("sweep", str(folder.resolve())),
        job_type="sweep",
        group=name,
        tags=("summary",),
        config={"sweep": name, "jobs": len(rows)},
    )
    with open_tracker(settings, run, folder=folder, outputs=outputs) as tracker:
        for ratio, numbers in curves.items():
            tracker.log({RATIO: ratio, **under(CURVE, numbers)})
        tracker.log({"comparison": table, **figures(images)})
