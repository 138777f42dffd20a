"""From the tracking group's configuration to a tracker.

In: the group's settings and what the run is. Out: a tracker that is closed whatever happens, and told whether
the run succeeded.
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
    """The run's JSON-lines file, and wandb beside it unless the mode is "none".

    Args:
        settings: mode, project, and whether artifacts are uploaded.
        run: what it is called.
        folder: of the run; gets the JSON-lines file.
        outputs: gets wandb's folder.

    Raises:
        ConfigError: wandb is to be online without a key, or WANDB_MODE is not known.
    """
    trackers: list[Tracker] = [JsonLines(folder / FILE_NAME)]
    mode = resolve_mode(settings.mode)
    if mode != "none":
        trackers.append(
            Wandb(run, mode=mode, project=settings.project, upload=settings.upload, folder=outputs)
        )
    tracker = Several(*trackers)
    try:
        yield tracker
    except BaseException:
        tracker.close(succeeded=False)
        raise
    tracker.close(succeeded=True)
