"""Tracking: the JSON-lines file always; wandb offline without a key, without asking and without waiting."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from heapr.errors import ConfigError
from heapr.schema import TrackingConfig
from heapr.tracking import wandb as wandb_tracker
from heapr.tracking.open_tracker import open_tracker
from heapr.tracking.tracker import Folder, Image, Table
from heapr.tracking.wandb import Wandb
from tests.tracking.offline_runs import tracked_run


def open_in(folder: Path, mode: str):
    settings = TrackingConfig(mode=mode, project="heapr-test")
    return open_tracker(settings, tracked_run(), folder=folder, outputs=folder / "outputs")


def test_lines_are_on_disk_before_the_run_ends(tmp_path: Path) -> None:
    with open_in(tmp_path, "none") as tracker:
        tracker.log({"perplexity/x": 3.5})
        (line,) = (tmp_path / "tracking.jsonl").read_text().splitlines()
        assert json.loads(line)["perplexity/x"] == 3.5
    assert not (tmp_path / "outputs").exists()


def test_tables_images_and_folders_have_a_line_too(tmp_path: Path) -> None:
    with open_in(tmp_path, "none") as tracker:
        tracker.log(
            {
                "layers": Table(["layer"], [[3]]),
                "figures/a": Image(tmp_path / "a.png"),
                "plan": Folder("prune", "key", tmp_path),
            }
        )
    line = json.loads((tmp_path / "tracking.jsonl").read_text())
    assert line["layers"] == {"columns": ["layer"], "rows": [[3]]}
    assert line["figures/a"] == {"path": str(tmp_path / "a.png")}
    assert line["plan"] == {"stage": "prune", "key": "key", "path": str(tmp_path)}


def test_wandb_runs_offline_and_says_how_to_sync(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    started = time.time()
    with open_in(tmp_path, "auto") as tracker:
        tracker.log({"perplexity/x": 3.5})
    assert time.time() - started < 20
    (folder,) = (tmp_path / "outputs" / "wandb").glob("offline-run-*")
    assert list(folder.glob("*.wandb"))
    assert f"wandb sync {folder}" in caplog.text


def test_trackers_learn_whether_the_run_succeeded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = []
    monkeypatch.setattr(Wandb, "close", lambda self, *, succeeded: told.append(succeeded))
    with open_in(tmp_path, "offline"):
        pass
    with pytest.raises(RuntimeError), open_in(tmp_path, "offline"):
        raise RuntimeError
    assert told == [True, False]


def test_mode_is_online_only_with_a_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NETRC", raising=False)
    assert wandb_tracker.resolve_mode("auto") == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    assert wandb_tracker.resolve_mode("auto") == "online"
    assert wandb_tracker.resolve_mode("offline") == "offline"
    monkeypatch.delenv("WANDB_API_KEY")
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password " + "k" * 40)
    (tmp_path / ".netrc").chmod(0o600)
    assert wandb_tracker.resolve_mode("auto") == "online"
    (tmp_path / ".netrc").rename(tmp_path / "elsewhere")
    assert wandb_tracker.resolve_mode("auto") == "offline"
    monkeypatch.setenv("NETRC", str(tmp_path / "elsewhere"))
    assert wandb_tracker.resolve_mode("auto") == "online"


@pytest.mark.parametrize(
    ("asked", "mode"), [("disabled", "none"), ("dryrun", "offline"), ("offline", "offline")]
)
def test_wandbs_own_variable_decides_where_nothing_was_asked(
    monkeypatch: pytest.MonkeyPatch, asked: str, mode: str
) -> None:
    monkeypatch.setenv("WANDB_MODE", asked)
    assert wandb_tracker.resolve_mode("auto") == mode
    assert wandb_tracker.resolve_mode("none") == "none" and wandb_tracker.resolve_mode("offline") == "offline"


def test_a_mode_that_wandb_does_not_know_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "of")
    with pytest.raises(
        ConfigError,
        match="WANDB_MODE='of' is unknown; choose one of online, run, offline, dryrun, disabled, or unset it",
    ):
        wandb_tracker.resolve_mode("auto")


def test_a_disabled_wandb_leaves_nothing_and_advises_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with open_in(tmp_path, "auto") as tracker:
        tracker.log({"perplexity/x": 3.5})
    assert "wandb sync" not in caplog.text and "WANDB_MODE=disabled: nothing goes to wandb" in caplog.text
    assert not (tmp_path / "outputs").exists() and (tmp_path / "tracking.jsonl").is_file()


def test_nobody_is_sent_to_a_folder_that_does_not_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    for place in (tmp_path / "gone", tmp_path):
        run = SimpleNamespace(dir=str(place / "files"), finish=lambda exit_code: None)
        monkeypatch.setattr(wandb_tracker, "_start", lambda *_, run=run: (run, "offline"))
        with open_in(tmp_path, "offline"):
            pass
    assert caplog.text.count("wandb sync") == 1 and f"wandb sync {tmp_path}\n" in caplog.text


def test_online_without_a_key_is_refused_rather_than_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ConfigError, match="no key is found"):
        wandb_tracker.resolve_mode("online")
