"""Words of messages and names, each said in one place."""

from __future__ import annotations

from pathlib import Path

import pytest

from heapr.files import hash_files
from heapr.network import answers
from heapr.words import did_you_mean, first_line, option_name, step_title


def test_first_line_of_an_error() -> None:
    assert first_line(ValueError("\n one\ntwo")) == "one"
    assert first_line(KeyError()) == "KeyError" and first_line(OSError("")) == "OSError"


def test_a_suggestion_is_put_into_a_message() -> None:
    assert did_you_mean("ratoi", ["ratio", "scope"]) == "did you mean ratio? "
    assert did_you_mean("ratoi", ["ratio"], before="pruning.") == "did you mean pruning.ratio? "
    assert did_you_mean("piq", ["piqa", "piqb", "x"], most=2) == "did you mean piqb or piqa? "
    assert did_you_mean("window", ["scope"]) == ""


NAMES = [("heapr.score.gradient.HeaprSum", "heapr_sum"), ("Fisher", "fisher"), ("a.b.Top1Norm", "top1_norm")]


@pytest.mark.parametrize(("target", "name"), NAMES)
def test_names_of_options(target: str, name: str) -> None:
    assert option_name(target) == name and option_name(target, " ") == name.replace("_", " ")


def test_titles_of_steps() -> None:
    assert [
        step_title("calibrate", ""),
        step_title("prune", "round 2 repair"),
        step_title("evaluate", "routing"),
    ] == [
        "calibrate",
        "prune round 2 repair",
        "routing",
    ]


def test_a_folders_hash_is_of_names_and_contents_in_a_fixed_order(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("b", "a")]
    for path in paths:
        path.write_text("same")
    before = hash_files(tmp_path, paths)
    assert before == hash_files(tmp_path, reversed(paths)) and before != hash_files(tmp_path, paths[:1])
    paths[0].rename(tmp_path / "c")
    assert hash_files(tmp_path, [tmp_path / "c", tmp_path / "a"]) != before


def test_nobody_answers_at_a_closed_port_and_a_proxy_alone_can_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert not answers("http://127.0.0.1:9")
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    assert answers("https://nobody.invalid")
