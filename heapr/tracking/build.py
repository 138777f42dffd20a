"""From the tracking group's configuration to a tracker.

In: the group's settings. Out: a tracker that is closed whatever happens, and told whether the run succeeded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from heapr.schema import TrackingConfig
from heapr.tracking.tracker import JsonLines, Several, Tracker
from heapr.tracking.wandb import Wandb, resolve_mode

FILE_NAME = "tracking.jsonl"


@contextmanager
def open_tracker(settings: TrackingConfig, *, name: str, folder: Path, outputs: Path, config: Mapping[str, Any]) -> Iterator[Tracker]:
    """The run's JSON-lines file, and wandb beside it unless the mode is "none".

    Args:
        settings: mode and project.
        name: of the run, readable.
        folder: of the run; gets the JSON-lines file.
        outputs: gets wandb's folder.
        config: the whole resolved configuration.

    Raises:
        ConfigError: wandb is to be online without a key.
    """
    trackers: list[Tracker] = [JsonLines(folder / FILE_NAME)]
    if settings.mode != "none":
        trackers.append(Wandb(resolve_mode(settings.mode), folder=outputs, project=settings.project, name=name, config=config))
    tracker = Several(*trackers)
    try:
        yield tracker
    except BaseException:
        tracker.close(succeeded=False)
        raise
    tracker.close(succeeded=True)
