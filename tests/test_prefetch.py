"""Prefetching: what is here, what is fetched, and one line for what is missing."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from heapr import hub, prefetch
from heapr.errors import ConfigError
from heapr.prefetch import fetch_all, main
from heapr.text.published_corpora import WikiText2
from tests.evaluation.test_zero_shot import write_task
from tests.experiment import compose_experiment


def test_everything_local_is_here(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    (tmp_path / "wiki.test.txt").write_text("some text\n")
    tasks = write_task(tmp_path / "tasks")
    config = compose_experiment(
        "evaluation/corpora=[pydocs,wikitext2]", f"evaluation.corpora.wikitext2.path={tmp_path}",
        "evaluation.zero_shot.tasks=[sums]", f"evaluation.zero_shot.include_path={tasks}",
    )  # fmt: skip
    assert fetch_all(config) == []
    assert caplog.messages == [
        "here     model builtin:qwen3_moe_tiny",
        "here     corpus wikitext2 (test)",
        "here     task sums",
    ]


def test_what_is_missing_is_fetched_where_there_is_a_network(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    asked = []

    def fetch(corpus: WikiText2) -> None:
        asked.append(corpus.split)
        if len(asked) % 2:
            raise ConfigError("not in the cache")

    monkeypatch.setattr(WikiText2, "fetch", fetch)
    monkeypatch.setattr(hub, "hub_is_reachable", lambda: True)
    assert fetch_all(compose_experiment("calibration=wikitext2", "evaluation=none")) == []
    assert asked == ["train", "train"]  # the caches, then the hub
    assert caplog.messages[-1] == "fetched  corpus wikitext2 (train)"


def test_what_is_missing_without_a_network_costs_a_line_each_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["evaluation=paper", "evaluation/corpora=[wikitext2]", "evaluation.zero_shot.tasks=[piqa]"])
    assert stopped.value.code == 2
    missing = [message for message in caplog.messages if message.startswith("missing")]
    assert len(missing) == 2 and "Salesforce/wikitext" in missing[0] and "baber/piqa" in missing[1]
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert (
        line
        == "error: 2 items that this experiment needs could not be fetched: corpus wikitext2 (test), task piqa"
    )


def test_a_misspelt_override_costs_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefetch.sys, "argv", ["prefetch", "pruning.ratoi=1"])
    with pytest.raises(SystemExit):
        main(["pruning.ratoi=1"])
    assert "did you mean pruning.ratio" in capsys.readouterr().err
