"""Mixtures: exact proportions, the same windows as alone, an identity of what counts, clear refusals."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from heapr.dry_run import dry_run
from heapr.errors import ConfigError
from heapr.plugins import build
from heapr.prefetch import fetch_all
from heapr.text.mixture import Mixture, apportion, identities_of_parts, parts_of
from heapr.text.windows import draw
from tests.experiment import CONF, compose_experiment, run_in, write_model, write_texts
from tests.tiny import byte_tokenizer

TEXT_FILES = "heapr.text.corpora.TextFiles"


def part(folder: Path, letter: str, weight: float, num_windows: int = 20) -> dict[str, Any]:
    """A corpus of one letter, its windows of 4 tokens told apart by a number."""
    path = folder / f"{letter}.txt"
    path.write_text("".join(f"{letter}{number:03d}" for number in range(num_windows)))
    return {
        "weight": weight,
        "corpus": {"_target_": TEXT_FILES, "paths": [str(path)], "split": "all", "name": letter},
    }


def windows_of(text: Any, num_samples: int, seed: int = 0) -> list[str]:
    tokenizer = byte_tokenizer()
    drawn = draw(text, tokenizer, length=4, num_samples=num_samples, seed=seed).ids_NW
    return [tokenizer.decode(row) for row in drawn]


@pytest.mark.parametrize(
    ("number", "shares", "expected"),
    [
        (10, [0.5, 0.5], [5, 5]),
        (7, [0.5, 0.5], [4, 3]),  # equal remainders: the first
        (10, [0.34, 0.33, 0.33], [4, 3, 3]),
        (8, [0.6, 0.3, 0.1], [5, 2, 1]),  # 4.8, 2.4, 0.8: one each for 4 and 0
        (128, [1.0], [128]),
        (100, [1 / 3, 2 / 3], [33, 67]),
    ],
)
def test_largest_remainders(number: int, shares: list[float], expected: list[int]) -> None:
    assert apportion(number, shares) == expected


def test_sequences_are_shared_out_by_weight(tmp_path: Path) -> None:
    mixture = Mixture(
        {"x": part(tmp_path, "a", 3), "y": part(tmp_path, "b", 1.0), "z": part(tmp_path, "c", 0.5)}
    )
    drawn = windows_of(mixture, 9)
    assert sorted(window[0] for window in drawn) == ["a"] * 6 + ["b"] * 2 + ["c"]
    assert len(set(drawn)) == 9
    assert windows_of(mixture, 9, seed=1) != drawn


def test_each_part_gives_the_windows_that_it_gives_alone(tmp_path: Path) -> None:
    entries = {"x": part(tmp_path, "a", 1), "y": part(tmp_path, "b", 3)}
    alone = {name: windows_of(build(entry["corpus"], "corpus"), 12) for name, entry in entries.items()}
    drawn = windows_of(Mixture(entries), 12)
    assert [window for window in drawn if window[0] == "a"] == alone["x"][:3]
    assert [window for window in drawn if window[0] == "b"] == alone["y"][:9]


def test_a_mixture_of_one_is_that_corpus(tmp_path: Path) -> None:
    entry = part(tmp_path, "a", 0.2)
    corpus, mixture = build(entry["corpus"], "corpus"), Mixture({"x": entry})
    assert mixture.identity() == corpus.identity() and mixture.name == "a"
    tokens = [
        draw(text, byte_tokenizer(), length=4, num_samples=7, seed=3).sha256 for text in (corpus, mixture)
    ]
    assert tokens[0] == tokens[1]


def test_order_names_and_scale_of_weights_play_no_part(tmp_path: Path) -> None:
    a, b = part(tmp_path, "a", 1), part(tmp_path, "b", 2)
    first = Mixture({"x": a, "y": b})
    second = Mixture({"b": b | {"weight": 4}, "a": a | {"weight": 2}})
    assert first.identity() == second.identity()
    assert windows_of(first, 11) == windows_of(second, 11)
    others = [
        Mixture({"x": a, "y": b | {"weight": 1}}),
        Mixture({"x": a, "y": part(tmp_path, "c", 2)}),
        Mixture({"x": a}),
    ]
    identities = [str(mixture.identity()) for mixture in (first, *others)]
    assert len(set(identities)) == 4
    assert [share for _, share in identities_of_parts(first.identity())] == [
        share for _, share in parts_of(first)
    ]


def test_mistakes_are_refused_in_one_line(tmp_path: Path) -> None:
    a, b = part(tmp_path, "a", 1), part(tmp_path, "b", 1, num_windows=5)
    mistakes: list[tuple[dict[str, Any], str]] = [
        ({}, "has no parts"),
        ({"x": a | {"weight": 0}}, "calibration.corpus.parts.x.weight=0 is not above 0"),
        ({"x": a, "y": b | {"weight": -1.5}}, "parts.y.weight=-1.5 is not above 0"),
        ({"x": a | {"weight": float("nan")}}, "weight=nan is not above 0"),
        ({"x": {"corpus": a["corpus"]}}, "parts.x.weight=None"),
        ({"x": a | {"wieght": 2}}, "did you mean calibration.corpus.parts.x.weight"),
        ({"x": {"weight": 1}}, "calibration.corpus.parts.x.corpus has no _target_"),
        (
            {"x": {"weight": 1, "corpus": {"_target_": "heapr.text.mixture.Mixture", "parts": {"x": a}}}},
            "which is not a corpus",
        ),
        ({"x": a, "y": a}, "two parts of the mixture are text of corpus 'a'"),
        ({"x": a, "y": b}, "asks for 8 sequences of corpus 'b', which holds 5 of 4 tokens"),
        (
            {"x": a, "y": b | {"weight": 0.01}},
            "corpus 'b' has a share of 0.0099 in the mixture, which is none of 16 sequences",
        ),
    ]
    for parts, message in mistakes:
        with pytest.raises(ConfigError, match=message) as caught:
            windows_of(Mixture(parts), 16)
        assert "\n" not in str(caught.value)


def test_nothing_is_measured_on_a_mixture(tmp_path: Path) -> None:
    part(tmp_path, "a", 1)
    corpus = f"{{_target_:{TEXT_FILES},paths:[{tmp_path}/a.txt],split:all}}"
    entry = f"{{_target_:heapr.text.mixture.Mixture,parts:{{a:{{weight:1,corpus:{corpus}}}}}}}"
    with pytest.raises(
        ConfigError, match="evaluation.corpora.mixed is a Mixture, which cannot be measured on"
    ):
        run_in(tmp_path, f"+evaluation.corpora.mixed={entry}")


@pytest.mark.parametrize(
    "name", [path.stem for path in sorted((CONF / "calibration" / "parts").glob("*.yaml"))]
)
def test_every_part_composes_and_builds(name: str, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("some text")
    paths = (
        [f"calibration.corpus.parts.text_files.corpus.paths=[{tmp_path}/text.txt]"]
        if name == "text_files"
        else []
    )
    config = compose_experiment(
        "calibration=mixture",
        f"calibration/parts@calibration.corpus.parts=[{name}]",
        f"calibration.corpus.parts.{name}.weight=2",
        *paths,
    )
    assert build(config.calibration.corpus, "calibration.corpus").name == name


def mixed_settings(folder: Path) -> list[str]:
    write_texts(folder)
    (folder / "other.txt").write_text("".join(f"Another line, number {number}.\n" for number in range(40)))
    parts = ",".join(
        f"{name}:{{weight:{weight},corpus:{{_target_:{TEXT_FILES},paths:[{folder}/{name}.txt],split:all}}}}"
        for name, weight in (("train", 2), ("other", 1))
    )
    return [
        "model=hf", f"model.path={write_model(folder / 'model')}", "model.dtype=float32",
        "calibration=mixture", "calibration/parts@calibration.corpus.parts=[]", f"+calibration.corpus.parts={{{parts}}}",
        "calibration.num_samples=6", "calibration.sequence_length=32", "evaluation/corpora=[text_files]",
        "evaluation/evaluators@evaluation=[perplexity]", "evaluation.perplexity.window=32",
    ]  # fmt: skip


def test_a_run_on_a_mixture_from_end_to_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    settings, paths = mixed_settings(tmp_path), "evaluation.corpora.text_files.paths"
    config = compose_experiment(
        "tracking=none", f"paths.outputs={tmp_path / 'outputs'}", *settings, f"{paths}=[{tmp_path}/test.txt]"
    )
    planned = [stage.key for stage in dry_run(config).stages]
    summary = run_in(tmp_path, *settings, f"{paths}=[{tmp_path}/test.txt]")
    assert planned == [stage["key"] for stage in summary.stages]
    assert (
        "mixture of 6 sequences: " in caplog.text
        and "4 of text_files (all)" in caplog.text
        and "2 of text_files (all)" in caplog.text
    )
    assert "is measured on text that is calibrated on" not in caplog.text
    folder = next(Path(stage["path"]) for stage in summary.stages if stage["stage"] == "prune")
    card = (folder / "checkpoint" / "README.md").read_text()
    assert "0.667 x `text_files` (all)" in card and "0.333 x `text_files` (all)" in card and "seed 0." in card
    run_in(tmp_path, *settings, f"{paths}=[{tmp_path}/other.txt]")
    assert "text_files is measured on text that is calibrated on" in caplog.text


def test_published_parts_are_fetched(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    (tmp_path / "wiki.train.txt").write_text("some text\n")
    config = compose_experiment(
        "calibration=mixture", "calibration/parts@calibration.corpus.parts=[pydocs,wikitext2]", "evaluation=none",
        f"calibration.corpus.parts.wikitext2.corpus.path={tmp_path}",
    )  # fmt: skip
    assert fetch_all(config) == []
    assert caplog.messages == ["here     model builtin:qwen3_moe_tiny", "here     corpus wikitext2 (train)"]
