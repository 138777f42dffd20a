"""The medium model's training at toy size: resumed equals uninterrupted, and what comes out can be loaded."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from experiments.medium import text as medium_text
from experiments.medium import train as medium
from heapr.model.find_model import find_model
from tests.same import logits

SMALL = medium.replace(medium.TOY, num_steps=4)
TOKENS = {
    name: torch.randint(300, (200,), generator=torch.Generator().manual_seed(0))
    for name in ("train", "heldout")
}


def trained(folder: Path, stops: list[float]) -> medium.Training:
    """Started anew for each stop, after so many seconds."""
    folder.mkdir()
    for seconds in stops:
        training = medium.Training(SMALL, "text", torch.device("cpu"), compiled=False)
        training.load(folder)
        medium.train(training, TOKENS, folder, seconds=seconds, every=2)
    return training


def test_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole", [math.inf])
    parts = trained(tmp_path / "parts", [0.0, 0.0, math.inf])
    assert whole.step == parts.step == 4 and parts.log[-1]["step"] == 4
    for name, weight in whole.weights.items():
        assert torch.equal(weight, parts.weights[name]), name
    other = medium.Training(medium.TOY, "text", torch.device("cpu"), compiled=False)
    with pytest.raises(SystemExit, match="another schedule or text"):
        other.load(tmp_path / "whole")


def test_the_full_model_has_the_size_that_is_promised() -> None:
    with torch.device("meta"):
        model = medium.build_model(medium.Schedule())
    assert 110e6 < sum(parameter.numel() for parameter in model.parameters()) < 150e6


def test_from_pages_to_a_model_that_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, output = tmp_path / "root", tmp_path / "model"
    for source in medium_text.SOURCES:
        folder = root / source.folder
        folder.mkdir(parents=True)
        for number in range(25):
            words = f"{source.package} page {number}: " + "words on a page. " * 40
            page = f"<html><head>not this</head><nav>nor this</nav><p>{words}</p></html>"
            suffix = source.pattern.rpartition(".")[2]
            (folder / f"{number}.{suffix}").write_text(page if suffix == "html" else words)
    about = medium_text.collect(root, tmp_path / "text")
    assert about["sqlite3-doc"]["kept_out"] and all(facts["documents"] == 25 for facts in about.values())
    line = (tmp_path / "text" / "git-doc.jsonl").read_text().splitlines()[0]
    assert "words on a page" in line and "this" not in line
    arguments = ["train.py", "--toy", "--text", str(tmp_path / "text"), "--output", str(output)]
    monkeypatch.setattr(sys, "argv", arguments)
    medium.main()
    model = AutoModelForCausalLM.from_pretrained(output / "final")
    ids_NW = AutoTokenizer.from_pretrained(output / "final")("words", return_tensors="pt").input_ids
    assert logits(model, ids_NW).isfinite().all()
    source = find_model(str(output / "final"), dtype=None)
    assert source.num_atomic_experts == 2 * 8 * 16
    kept_out = (output / "kept_out.jsonl").read_text().splitlines()
    assert len(kept_out) == 25 and json.loads(kept_out[0])["text"].startswith("sqlite3-doc")


def test_a_missing_package_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="python3.11-doc postgresql-doc-15"):
        medium_text.collect(tmp_path, tmp_path / "text")
