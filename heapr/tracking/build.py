"""From the tracking group's configuration to a tracker."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from heapr.tracking.tracker import JsonLines, Several, Tracker

FILE_NAME = "tracking.jsonl"
logger = logging.getLogger(__name__)


def open_tracker(mode: str, *, project: str, run_folder: Path, wandb_folder: Path, name: str, config: Mapping[str, Any]) -> Tracker:
    """The run's JSON-lines file, and wandb beside it unless mode is "none"."""
    lines = JsonLines(run_folder / FILE_NAME)
    if mode == "none":
        return lines
    from heapr.tracking.wandb import Wandb

    return Several(lines, Wandb(mode, folder=wandb_folder, project=project, name=name, config=config))
