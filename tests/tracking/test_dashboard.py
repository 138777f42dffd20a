"""The dashboard: what it shows, built without a network, and what it says when it cannot be made."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import wandb

from heapr.errors import ConfigError
from heapr.tracking.dashboard import build_dashboard, create_dashboard, main
from tests.tracking.server import serving

NAMES = [
    "calibration/loss", "change/accuracy/average", "change/perplexity/wikitext2", "curve/accuracy/average/heapr",
    "curve/perplexity/wikitext2/heapr", "curve/perplexity/wikitext2/camera (layer)", "figures/ratio_curve", "parameters",
    "pruned/perplexity/wikitext2",
]  # fmt: skip
needs_workspaces = pytest.mark.skipif(
    importlib.util.find_spec("wandb_workspaces") is None,
    reason="needs wandb-workspaces: pip install 'heapr[dashboard]'",
)


@needs_workspaces
def test_ratios_and_criteria_are_compared() -> None:
    view = json.loads(
        build_dashboard("me", "heapr", NAMES)
        ._to_model()
        .spec.model_dump_json(by_alias=True, exclude_none=True)
    )
    sections = {
        section["name"]: section["panels"] for section in view["section"]["panelBankConfig"]["sections"]
    }
    curves = [panel["config"] for panel in sections["Quality by ratio"]]
    assert [curve["metrics"] for curve in curves] == [[NAMES[3]], NAMES[4:6]]
    assert {curve["xAxis"] for curve in curves} == {"pruning.ratio"}
    scatters = [
        (panel["config"]["xAxis"], panel["config"]["yAxis"]) for panel in sections["Damage by what is saved"]
    ]
    assert ("summary:flops_removed_ratio", "summary:change/perplexity/wikitext2") in scatters
    tables = json.dumps(sections["Tables"])
    assert '"val": "comparison"' in tables and '"val": "layers"' in tables
    assert [panel["config"]["mediaKeys"] for panel in sections["Figures"]] == [["figures/ratio_curve"]]
    assert sections["Calibration"][0]["config"]["xAxis"] == "calibration/tokens"


@needs_workspaces
def test_a_project_without_metrics_has_nothing_to_compare() -> None:
    with pytest.raises(ConfigError, match="no run of 'me/heapr' has metrics yet"):
        build_dashboard("me", "heapr", ["calibration/loss"])


@needs_workspaces
def test_without_a_key_or_the_library_one_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NETRC", raising=False)
    with pytest.raises(SystemExit, match="2"):
        main(["--project", "p"])
    error = capsys.readouterr().err
    assert error.startswith("error: ") and len(error.splitlines()) == 1
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'heapr\[dashboard\]'"):
        create_dashboard(None, "p")


@needs_workspaces
def test_a_server_that_is_not_there_or_does_not_know_the_key_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    with pytest.raises(ConfigError, match="does not answer"):
        create_dashboard("me", "p")
    with serving(401) as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        wandb.teardown()  # it remembers the server of the run before
        with pytest.raises(ConfigError, match="wandb made no dashboard of 'p'") as caught:
            create_dashboard("me", "p")
    assert "\n" not in str(caught.value)
