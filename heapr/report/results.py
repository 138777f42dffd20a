"""What a report is made from: the jobs of a sweep, those that failed too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class JobResult:
    """One job of a sweep.

    Attributes:
        number: its place in the sweep.
        overrides: of its configuration.
        folder: its own; none if it never started.
        summary: as in summary.json; none if it did not finish.
        error: one line, why it did not finish.
    """

    number: int
    overrides: tuple[str, ...]
    folder: Path | None
    summary: Mapping[str, Any] | None
    error: str | None
