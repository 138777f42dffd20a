"""Tracking: the JSON-lines file always; wandb offline without a key, without asking and without waiting."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

import pytest

from heapr.tracking import wandb as wandb_tracker
from heapr.tracking.build import open_tracker


def open_in(folder: Path, mode: str):
    return open_tracker(mode, project="heapr-test", run_folder=folder, wandb_folder=folder / "outputs", name="name", config={"ratio": 0.5})


def test_lines_are_on_disk_before_the_run_ends(tmp_path: Path) -> None:
    tracker = open_in(tmp_path, "none")
    tracker.log({"perplexity/x": 3.5})
    (line,) = (tmp_path / "tracking.jsonl").read_text().splitlines()
    assert json.loads(line)["perplexity/x"] == 3.5
    tracker.close()
    assert not (tmp_path / "outputs").exists()


def test_wandb_runs_offline_and_says_how_to_sync(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    started = time.time()
    tracker = open_in(tmp_path, "auto")
    tracker.log({"perplexity/x": 3.5})
    tracker.close()
    assert time.time() - started < 20
    (folder,) = (tmp_path / "outputs" / "wandb").glob("offline-run-*")
    assert list(folder.glob("*.wandb"))
    assert f"wandb sync {folder}" in caplog.text


def test_mode_is_online_only_with_a_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert wandb_tracker.resolve_mode("auto") == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    assert wandb_tracker.resolve_mode("auto") == "online"
    assert wandb_tracker.resolve_mode("offline") == "offline"
    monkeypatch.delenv("WANDB_API_KEY")
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password " + "k" * 40)
    (tmp_path / ".netrc").chmod(0o600)
    assert wandb_tracker.resolve_mode("auto") == "online"


def test_an_unreachable_wandb_falls_back_to_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setattr(wandb_tracker, "INIT_TIMEOUT_SECONDS", 2)
    started = time.time()
    tracker = open_in(tmp_path, "auto")
    tracker.close()
    assert time.time() - started < 30
    assert "goes on offline" in caplog.text
    assert list((tmp_path / "outputs" / "wandb").glob("offline-run-*"))
