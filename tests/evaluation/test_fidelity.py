"""Divergence from the dense model against a slow reference."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from heapr.evaluation.fidelity import Fidelity
from heapr.evaluation.measurement import Material
from heapr.model import loss
from heapr.model.find_model import find_model
from heapr.text.corpora import TextFiles
from tests.evaluation.material import material_of
from tests.tiny import byte_tokenizer, tiny_ids

TEXT = "The quick brown fox jumps over the lazy dog; " * 3


def measure(
    material: Material, folder: Path, batch_size: int = 4, max_windows: int | None = None
) -> dict[str, float]:
    (folder / "text.txt").write_text(TEXT)
    corpus = TextFiles([str(folder / "text.txt")], split="all")
    evaluator = Fidelity(corpus, window=16, batch_size=batch_size, max_windows=max_windows)
    material.model().model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    evaluator.prepare(find_model(str(folder), dtype="float32"))
    return evaluator(material).metrics


@pytest.fixture
def material(causal_lm: PreTrainedModel) -> Material:
    return material_of(causal_lm, tiny_ids(4, 12))


def slow_reference(material: Material, chosen: list[int]) -> tuple[float, float]:
    """Token by token, from the definition, in plain Python."""
    dense, pruned = material.dense_and_pruned()
    ids = byte_tokenizer()(TEXT)["input_ids"]
    windows = [ids[start : start + 16] for start in range(0, len(ids) - 15, 16)]
    divergences, agreements = [], []
    for window in (windows[number] for number in chosen):
        for end in range(1, 16):
            with torch.no_grad():
                p, q = (
                    m.model(input_ids=torch.tensor([window[:end]])).logits[0, -1].double().softmax(0).tolist()
                    for m in (dense, pruned)
                )
            divergences.append(sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True)))
            agreements.append(p.index(max(p)) == q.index(max(q)))
    return sum(divergences) / len(divergences), sum(agreements) / len(agreements)


def test_equals_the_definition(material: Material, tmp_path: Path) -> None:
    divergence, agreement = slow_reference(material, list(range(8)))
    metrics = measure(material, tmp_path)
    assert metrics["kl_to_dense/text_files"] == pytest.approx(divergence, rel=1e-5)
    assert metrics["top1_agreement/text_files"] == pytest.approx(agreement)
    assert divergence > 1e-3 and 0 < agreement < 1  # pruning did something


def test_windows_are_taken_evenly(material: Material, tmp_path: Path) -> None:
    divergence, _ = slow_reference(material, [0, 2, 5])  # of eight
    assert measure(material, tmp_path, max_windows=3)["kl_to_dense/text_files"] == pytest.approx(
        divergence, rel=1e-5
    )
    assert measure(material, tmp_path, max_windows=100) == measure(material, tmp_path)


def test_depends_neither_on_batches_nor_on_chunks_of_logits(
    material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = measure(material, tmp_path)
    assert measure(material, tmp_path, batch_size=3) == pytest.approx(expected, rel=1e-5)
    monkeypatch.setattr(loss, "LOGITS_CHUNK", 257 * 7)  # seven tokens at a time
    assert measure(material, tmp_path) == pytest.approx(expected, rel=1e-5)


def test_a_model_equals_itself(causal_lm: PreTrainedModel, tmp_path: Path) -> None:
    metrics = measure(material_of(causal_lm, tiny_ids(4, 12), ratio=0.0), tmp_path)
    assert metrics == {"kl_to_dense/text_files": 0, "top1_agreement/text_files": 1}


def test_not_a_number_is_refused(material: Material, tmp_path: Path) -> None:
    dense, _ = material.dense_and_pruned()
    with torch.no_grad():
        dense.model.lm_head.weight[3] = float("nan")
    with pytest.raises(
        FloatingPointError, match="fidelity/text_files: the divergence is NaN or infinite in batch 0"
    ):
        measure(material, tmp_path)
