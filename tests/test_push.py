"""Uploading a checkpoint, against a stub of the hub's API."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest

from heapr import prepare, push
from heapr.errors import ConfigError
from heapr.push import check_destination
from heapr.run_experiment import run
from tests.experiment import compose_experiment, run_in, write_model, write_texts
from tests.hub_stub import HubStub, serving_hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStub]:
    """A hub that this process takes for the real one, and a login."""
    with serving_hub() as server:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", server.token)
        yield server


def pushed(tmp_path: Path, *overrides: str) -> Path:
    """Run an experiment that uploads its checkpoint, and return the checkpoint's folder."""
    folder = tmp_path / "model"
    if not folder.exists():
        write_model(folder)
    run_in(
        tmp_path, *write_texts(tmp_path), "model=hf", f"model.path={folder}", "model.dtype=float32", "evaluation.routing=null",
        "evaluation.truth=null", "evaluation.fidelity=null", "evaluation.throughput=null", *overrides,
    )  # fmt: skip
    (checkpoint,) = (tmp_path / "outputs").glob("artifacts/prune/*/checkpoint")
    return checkpoint


def test_the_checkpoint_and_its_card_are_uploaded_and_private(hub: HubStub, tmp_path: Path) -> None:
    checkpoint = pushed(tmp_path, "pruning.push_to=me/pruned")
    assert hub.repositories == {"me/pruned": True}
    files = {path.relative_to(checkpoint).as_posix(): path.read_bytes() for path in checkpoint.rglob("*") if path.is_file()}  # fmt: skip
    assert hub.files["me/pruned"] == files
    assert b"| perplexity/text_files |" in files["README.md"] and "heapr/plan.safetensors" in files
    hub.files.clear()
    pushed(tmp_path, "pruning.push_to=me/pruned")  # from the store, into a repository that is there
    assert hub.files["me/pruned"] == files


def test_everybody_sees_it_on_request_alone(hub: HubStub, tmp_path: Path) -> None:
    pushed(tmp_path, "pruning.push_to=ours/pruned", "pruning.push_public=true")
    assert hub.repositories == {"ours/pruned": False}
    with pytest.raises(ConfigError, match=r"everybody sees it; give pruning\.push_public=true"):
        check_destination("ours/pruned", is_public=False)


def test_a_failed_upload_loses_nothing(hub: HubStub, tmp_path: Path) -> None:
    hub.takes_commits = False
    with pytest.raises(ConfigError) as failed:
        pushed(tmp_path, "pruning.push_to=me/pruned")
    message = str(failed.value)
    assert (
        message.startswith("the run is finished, but pruning.push_to='me/pruned' failed")
        and "\n" not in message
    )
    assert (tmp_path / "run" / "summary.json").is_file()
    hub.takes_commits = True
    pushed(tmp_path, "pruning.push_to=me/pruned")
    assert "model.safetensors" in hub.files["me/pruned"]


@pytest.mark.parametrize(
    ("hub_id", "message"),
    [
        ("pruned", "is no hub id; give owner/name"),
        ("me/a/b", "is no hub id"),
        ("me/with blank", "is no hub id"),
        ("me/a--b", "is no hub id"),
        ("theirs/pruned", "'theirs' is not among the owners that this login writes for (me, ours)"),
    ],
)
def test_other_destinations_are_refused(hub: HubStub, hub_id: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check_destination(hub_id, is_public=False)
    assert message in str(refused.value) and "\n" not in str(refused.value)
    assert not hub.repositories


def test_a_login_that_the_hub_does_not_know_is_refused(hub: HubStub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_unknown")
    with pytest.raises(ConfigError, match="the hub refuses"):
        check_destination("me/pruned", is_public=False)
    monkeypatch.setattr(push.huggingface_hub, "get_token", lambda: None)
    with pytest.raises(ConfigError, match="nobody is logged in; run hf auth login or set HF_TOKEN"):
        check_destination("me/pruned", is_public=False)


def test_without_the_hub_no_work_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "build_plugins", lambda *_: pytest.fail("work began"))
    config = compose_experiment("pruning.push_to=me/pruned", f"paths.outputs={tmp_path / 'never'}")
    with pytest.raises(ConfigError, match=r"the hub cannot be reached \(HF_HUB_OFFLINE is set\)"):
        run(config, tmp_path)
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["pruning.push_to=me/x", "pruning.save_checkpoint=false"],
            "pruning.save_checkpoint=false makes none",
        ),
        (["pruning.push_public=true"], "without pruning.push_to=<owner/name> has no effect"),
    ],
)
def test_options_that_contradict_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        compose_experiment(*overrides)
    assert message in str(refused.value)
