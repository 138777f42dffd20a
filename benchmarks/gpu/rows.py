"""What is measured: rows of a table, beside what was predicted, and times taken in turns."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from heapr.measure import wait_for

PREDICTIONS = Path(__file__).parent / "PREDICTIONS.md"
PREDICTION = re.compile(r"^\| `(?P<name>[^`]+)` \|(?P<predicted>[^|]*)\|(?P<aim>[^|]*)\|", re.MULTILINE)


@dataclass(frozen=True)
class Row:
    """One figure; its name is that of its prediction."""

    name: str
    value: float
    unit: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def predictions() -> dict[str, tuple[str, str]]:
    """What PREDICTIONS.md predicts and aims at, by a row's name."""
    found = PREDICTION.finditer(PREDICTIONS.read_text())
    return {match["name"]: (match["predicted"].strip(), match["aim"].strip()) for match in found}


def table(rows: Sequence[Row]) -> str:
    """Rows beside their predictions."""
    lines = [("", "measured", "predicted", "aim")]
    predicted = predictions()
    for row in rows:
        measured = f"{row.value:.4g} {row.unit}".strip()
        line = (row.name, measured, *predicted.get(row.name, ("", "")))
        lines.append(line)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join("  ".join(cells).rstrip() for cells in padded)


def seconds_in_turns(
    procedures: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    repeats: int,
    inner: int = 1,
    warm: bool = True,
) -> dict[str, float]:
    """Median seconds of each; all take turns.

    Args:
        inner: how often a procedure runs between two looks at the clock.
        warm: whether a turn that does not count comes first.
    """
    times: dict[str, list[float]] = {name: [] for name in procedures}
    for turn in range(repeats + warm):
        for name, procedure in procedures.items():
            wait_for(device)
            started = time.perf_counter()
            for _ in range(inner):
                procedure()
            wait_for(device)
            if turn >= warm:
                times[name].append((time.perf_counter() - started) / inner)
    return {name: statistics.median(values) for name, values in times.items()}
