"""From the tracking group's configuration to a tracker.

In: the group's settings and a description of the run. Out: a tracker that is always closed, with the run's
success or failure.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from heapr.schema import TrackingConfig
from heapr.tracking.tracker import JsonLines, Run, Several, Tracker
from heapr.tracking.wandb import Wandb, resolve_mode

FILE_NAME = "tracking.jsonl"


@contextmanager
def open_tracker(settings: TrackingConfig, run: Run, *, folder: Path, outputs: Path) -> Iterator[Tracker]:
    """Track a run in its JSON-lines file, and with wandb unless the mode is "none".

    Args:
        settings: mode, project, and whether artifacts are uploaded.
        run: its name, id and configuration.
        folder: of the run; gets the JSON-lines file.
        outputs: gets wandb's folder.

    Raises:
        ConfigError: wandb must be online but there is no key, or WANDB_MODE is unknown.
    """
    trackers: list[Tracker] = [JsonLines(folder / FILE_NAME)]
    mode = resolve_mode(settings.mode)
    if mode != "none":
        wandb = Wandb(run, mode=mode, project=settings.project, upload=settings.upload, folder=outputs)
        trackers.append(wandb)
    tracker = Several(*trackers)
    try:
        yield tracker
    except BaseException:
        tracker.close(succeeded=False)
        raise
    tracker.close(succeeded=True)
