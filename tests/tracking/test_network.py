"""Whatever the network does, a run goes on: soon, with a warning, and with everything on disk."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import wandb

from heapr.schema import TrackingConfig
from heapr.tracking import wandb as wandb_tracker
from heapr.tracking.open_tracker import open_tracker
from tests.tracking.offline_runs import offline_runs, read_run, tracked_run
from tests.tracking.server import serving

DIES_IN_THE_MIDDLE = """
import logging, sys, time
from pathlib import Path
from heapr.schema import TrackingConfig
from heapr.tracking import wandb as wandb_tracker
from heapr.tracking.open_tracker import open_tracker
from heapr.tracking.tracker import Folder, Table
from tests.tracking.server import serving
from tests.tracking.offline_runs import tracked_run

logging.basicConfig(level=logging.INFO)
wandb_tracker.MEDIA_SECONDS = wandb_tracker.FINISH_SECONDS = 1
folder = Path(sys.argv[1])
with serving() as server:
    import os
    os.environ["WANDB_BASE_URL"] = server.url
    with open_tracker(TrackingConfig(mode="online", project="p"), tracked_run(), folder=folder, outputs=folder / "outputs") as tracker:
        server.silence.set()
        started = time.time()
        tracker.log({"pruning.ratio": 0.5, "perplexity/x": 3.5})
        tracker.log({"layers": Table(["a"], [[1]]), "artifacts/plan": Folder("plan", "key", folder)})
    assert time.time() - started < 5
"""


@pytest.fixture
def with_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setattr(wandb_tracker, "START_SECONDS", 2.0)
    wandb.teardown()  # it remembers the server of the run before


def track(folder: Path) -> float:
    """Seconds of a run that logs one number."""
    started = time.time()
    with open_tracker(
        TrackingConfig(mode="auto", project="p"), tracked_run(), folder=folder, outputs=folder / "outputs"
    ) as tracker:
        tracker.log({"pruning.ratio": 0.5, "perplexity/x": 3.5})
    return time.time() - started


@pytest.mark.usefixtures("with_key")
def test_nobody_listens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    assert track(tmp_path) < 10
    assert "127.0.0.1 does not answer" in caplog.text and "goes on offline" in caplog.text
    assert offline_runs(tmp_path / "outputs")[0].last["perplexity/x"] == 3.5


@pytest.mark.usefixtures("with_key")
@pytest.mark.parametrize(
    ("status", "silent", "reason"),
    [
        pytest.param(401, False, "status 401", id="wrong key"),
        pytest.param(200, True, "context deadline exceeded", id="no answer", marks=pytest.mark.slow),
    ],
)
def test_a_server_that_does_not_let_us_in(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    status: int,
    silent: bool,
    reason: str,
) -> None:
    caplog.set_level(logging.INFO)
    with serving(status, silent=silent) as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        assert track(tmp_path) < 10
    assert reason in caplog.text and "goes on offline" in caplog.text and "wandb sync" in caplog.text
    assert offline_runs(tmp_path / "outputs")[0].last["perplexity/x"] == 3.5


@pytest.mark.slow
def test_the_network_dies_in_the_middle_and_the_process_still_ends(tmp_path: Path) -> None:
    environment = {**os.environ, "WANDB_API_KEY": "k" * 40, "HOME": str(tmp_path), "PYTHONPATH": os.getcwd()}
    environment.pop("WANDB_MODE")
    command = [sys.executable, "-c", DIES_IN_THE_MIDDLE, str(tmp_path)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    assert "not taken in time" in result.stderr and "Timed out finishing run" in result.stderr
    (folder,) = (tmp_path / "outputs" / "wandb").glob("run-*")
    assert f"wandb sync {folder}" in result.stderr
    assert read_run(folder).last["perplexity/x"] == 3.5
    assert "perplexity/x" in (tmp_path / "tracking.jsonl").read_text()


def test_wandbs_own_process_dies_and_the_next_run_is_tracked_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = TrackingConfig(mode="offline", project="p")
    wandb.teardown()  # a process of this test's own
    with open_tracker(settings, tracked_run(), folder=tmp_path, outputs=tmp_path / "first") as tracker:
        (service,) = [child for child in psutil.Process().children() if child.name() == "wandb-core"]
        service.kill()
        service.wait(5)
        tracker.log({"perplexity/x": 3.5})
    assert "wandb failed" in caplog.text
    assert "perplexity/x" in (tmp_path / "tracking.jsonl").read_text()
    with open_tracker(settings, tracked_run(), folder=tmp_path, outputs=tmp_path / "second") as tracker:
        tracker.log({"perplexity/x": 4.5})
    assert offline_runs(tmp_path / "second")[0].last["perplexity/x"] == 4.5
