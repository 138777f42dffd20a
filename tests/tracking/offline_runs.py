"""Read wandb's offline runs with wandb's own reader."""

from __future__ import annotations

import json
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wandb.util import get_core_path

from heapr.tracking.tracker import Run

WRITTEN_SECONDS = 20.0  # longest wait for the end of a run to be on disk


@dataclass(frozen=True)
class OfflineRun:
    """What an offline run's file holds.

    Attributes:
        folder: of the run.
        run: name, id, group, job type, tags, as wandb calls them.
        config: values by key.
        history: rows, nested names joined by dots.
        axes: what each metric is drawn over.
        artifacts: those that the run logged.
        exit_code: of the run.
    """

    folder: Path
    run: dict[str, Any]
    config: dict[str, Any]
    history: list[dict[str, Any]]
    axes: dict[str, str]
    artifacts: list[dict[str, Any]]
    exit_code: int

    @property
    def last(self) -> dict[str, Any]:
        """The last value of everything."""
        return {name: value for row in self.history for name, value in row.items()}

    def table(self, name: str) -> dict[str, Any]:
        return json.loads((self.folder / "files" / self.last[f"{name}.path"]).read_text())


def offline_runs(outputs: Path) -> list[OfflineRun]:
    """All runs below a folder of outputs, oldest first."""
    runs = map(read_run, (outputs / "wandb").glob("offline-run-*"))
    return sorted(runs, key=lambda run: str(run.run["start_time"]))  # folders' names tell seconds only


def read_run(folder: Path) -> OfflineRun:
    by_type = _records(folder)
    run = by_type["run"][0]
    return OfflineRun(
        folder=folder,
        run=run,
        config=run["config"]["update"],
        history=[row["item"] for row in by_type.get("history", [])],
        axes={metric["name"]: metric["step_metric"] for metric in by_type.get("metric", [])},
        artifacts=by_type.get("artifact", []),
        exit_code=by_type["exit"][0].get("exit_code", 0),
    )


def _records(folder: Path) -> dict[str, list[Any]]:
    """What is in a run's file, by type. wandb's own process may still be writing its end."""
    (file,) = folder.glob("*.wandb")
    command = [get_core_path(), "leet", "inspect", "-json", "-no-observability", "-run-file", str(file)]
    deadline = time.monotonic() + WRITTEN_SECONDS
    while True:
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        by_type: dict[str, list[Any]] = {}
        for line in output.splitlines():
            record = json.loads(line)
            by_type.setdefault(record["type"], []).append(record[record["type"]])
        if "exit" in by_type or time.monotonic() > deadline:
            return by_type
        time.sleep(0.1)


def tracked_run(run_id: str = "id", group: str | None = None) -> Run:
    """A run with little to say."""
    return Run(
        name="name",
        id=run_id,
        job_type="experiment",
        group=group,
        tags=("tag",),
        config={"pruning": {"ratio": 0.5}},
    )
