"""The real thing: the built-in models on real text, pruned at 25 %; in the quick suite on a little of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import heapr
from heapr.inputs import BUILTIN_FOLDER
from heapr.model.find_model import find_model
from heapr.run_experiment import Summary
from heapr.text.corpora import PackageDocs
from tests.experiment import run_in

SMALLER = [
    "calibration.num_samples=64",
    "evaluation/corpora=[pydocs]",
    "evaluation/evaluators@evaluation=[perplexity]",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("builtin")


@pytest.fixture(scope="module")
def perplexity(folder: Path) -> dict[str, float]:
    """Held-out perplexity: dense, and pruned at 25 % by each criterion."""
    found = {}
    for score in ("heapr", "fisher", "heapr_sum", "magnitude", "random"):
        metrics = run_in(folder, f"score={score}", "pruning.ratio=0.25", *SMALLER).metrics
        found["dense"] = metrics["dense"]["perplexity/pydocs"]
        found[score] = metrics["pruned"]["perplexity/pydocs"]
    return found


@pytest.fixture(scope="module")
def deepseek_run(tmp_path_factory: pytest.TempPathFactory) -> Summary:
    """The model with shared experts and a dense layer, pruned at 25 % by heapr."""
    return run_in(
        tmp_path_factory.mktemp("deepseek"),
        "model=tiny_deepseek",
        "pruning.ratio=0.25",
        *SMALLER,
        "calibration.num_samples=32",
    )


def card_perplexity(name: str) -> float:
    return float(re.search(r"\*\*([0-9.]+)\*\*", (BUILTIN_FOLDER / name / "README.md").read_text())[1])


def test_a_quarter_costs_little_if_it_is_chosen_well() -> None:
    source = find_model("builtin:qwen3_moe_tiny", dtype="float32")
    texts, held_out = (PackageDocs(package, "all") for package in ("email", "json"))
    increase = {}
    for score in ("heapr", "random"):
        metrics = heapr.prune(
            source.load(torch.device("cpu")).model, source.tokenizer, texts, evaluate_on=held_out, recipe=None, score=score, ratio=0.25,
            num_samples=16, sequence_length=128, batch_size=8,
        ).metrics  # fmt: skip
        dense, pruned = (metrics[variant]["perplexity/jsondocs"] for variant in ("dense", "pruned"))
        increase[score] = pruned / dense - 1
    assert 0 < increase["heapr"] < 0.2
    assert increase["random"] > 3 * increase["heapr"]


@pytest.mark.slow
def test_the_dense_model_reaches_its_cards_figure(perplexity: dict[str, float]) -> None:
    assert perplexity["dense"] == pytest.approx(card_perplexity("qwen3_moe_tiny"), rel=1e-3)
    assert perplexity["dense"] <= 32


@pytest.mark.slow
def test_the_deepseek_model_reaches_its_cards_figure_and_prunes_well(deepseek_run: Summary) -> None:
    dense, pruned = (deepseek_run.metrics[variant]["perplexity/pydocs"] for variant in ("dense", "pruned"))
    assert dense == pytest.approx(card_perplexity("deepseek_moe_tiny"), rel=1e-3)
    assert dense <= 32
    assert dense < pruned <= 1.10 * dense


@pytest.mark.slow
def test_heapr_stays_within_ten_percent_of_the_dense_model(perplexity: dict[str, float]) -> None:
    assert perplexity["dense"] < perplexity["heapr"] <= 1.10 * perplexity["dense"]


@pytest.mark.slow
def test_heapr_beats_the_controls_by_a_wide_margin(perplexity: dict[str, float]) -> None:
    """Their increase over the dense model is at least five times as large."""
    increase = {name: value - perplexity["dense"] for name, value in perplexity.items()}
    assert increase["magnitude"] > 5 * increase["heapr"]
    assert increase["random"] > 5 * increase["heapr"]


@pytest.mark.slow
def test_the_joint_moment_is_no_worse_than_the_product_of_moments(perplexity: dict[str, float]) -> None:
    assert perplexity["fisher"] <= perplexity["heapr_sum"] * 1.02


@pytest.mark.slow
def test_accuracy_is_above_chance_and_falls_with_pruning(folder: Path) -> None:
    """Which of four continuations is the docstring's own: chance is 25 %."""
    only = ["evaluation/corpora=[]", "evaluation/evaluators@evaluation=[zero_shot]"]
    metrics = run_in(
        folder,
        "score=random",
        "pruning.ratio=0.6",
        "calibration.num_samples=64",
        "evaluation.zero_shot.limit=250",
        *only,
    ).metrics
    dense, pruned = (metrics[variant]["accuracy/pydocs_continuation"] for variant in ("dense", "pruned"))
    assert dense > 0.25 + 6 * metrics["dense"]["accuracy_stderr/pydocs_continuation"]
    assert 0.25 < pruned < dense - 0.1
