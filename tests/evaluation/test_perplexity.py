"""Perplexity against a slow token-by-token reference."""

from __future__ import annotations

import hashlib
import math
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from heapr.evaluation.perplexity import Perplexity, perplexity_increases
from heapr.model import loss
from heapr.model.moe import MoEModel
from heapr.text.corpora import TextFiles
from tests.evaluation.material import Source, of_model
from tests.tiny import byte_tokenizer, tiny_qwen3_moe

TEXT = "The quick brown fox jumps over the lazy dog; " * 3


def measure(model: MoEModel, folder: Path, batch_size: int) -> dict[str, Any]:
    (folder / "text.txt").write_text(TEXT)
    evaluator = Perplexity(
        TextFiles([str(folder / "text.txt")], split="all"), window=16, batch_size=batch_size
    )
    evaluator.prepare(Source(byte_tokenizer()))
    found = evaluator(of_model(model))
    return {
        **found.metrics,
        **{f"protocol/{name}": record for name, record in found.details["protocols"].items()},
    }


def test_equals_a_token_by_token_reference(model: MoEModel, tmp_path: Path) -> None:
    ids = byte_tokenizer()(TEXT)["input_ids"]
    windows = [ids[start : start + 16] for start in range(0, len(ids) - 15, 16)]
    losses = []
    for window in windows:
        for position in range(1, 16):
            with torch.no_grad():
                logits = model.model(input_ids=torch.tensor([window[:position]]), use_cache=False).logits[
                    0, -1
                ]
            losses.append(-torch.log_softmax(logits.double(), dim=0)[window[position]].item())
    metrics = measure(model, tmp_path, batch_size=4)
    assert metrics["perplexity/text_files"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-6)
    assert metrics["num_tokens/text_files"] == 16 * len(windows)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_does_not_depend_on_the_batch_size(model: MoEModel, tmp_path: Path, batch_size: int) -> None:
    expected = measure(model, tmp_path, batch_size=4)["perplexity/text_files"]
    assert measure(model, tmp_path, batch_size)["perplexity/text_files"] == pytest.approx(expected, rel=1e-6)


def test_does_not_depend_on_the_chunk_of_logits(
    model: MoEModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = measure(model, tmp_path, batch_size=4)["perplexity/text_files"]
    monkeypatch.setattr(loss, "LOGITS_CHUNK", 257 * 7)  # seven tokens at a time
    assert measure(model, tmp_path, batch_size=4)["perplexity/text_files"] == pytest.approx(
        expected, rel=1e-6
    )


def test_not_a_number_is_refused_not_cached(model: MoEModel, tmp_path: Path) -> None:
    with torch.no_grad():
        model.model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(
        FloatingPointError, match="perplexity/text_files: the loss is NaN or infinite in batch 0"
    ):
        measure(model, tmp_path, batch_size=4)


@pytest.mark.parametrize("batch_size", [1, 100])
def test_never_holds_more_logits_than_the_chunk(
    model: MoEModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_size: int
) -> None:
    monkeypatch.setattr(loss, "LOGITS_CHUNK", 257 * 7)
    sizes: list[int] = []
    model.model.lm_head.register_forward_hook(lambda head, inputs, logits: sizes.append(logits.numel()))
    measure(model, tmp_path, batch_size)
    assert max(sizes) == 257 * 7


def test_losses_of_a_bfloat16_model_are_summed_in_float32(tmp_path: Path) -> None:
    model = MoEModel(tiny_qwen3_moe().bfloat16())
    ids = torch.tensor(byte_tokenizer()(TEXT)["input_ids"])
    ids_NW = ids[: len(ids) // 16 * 16].view(-1, 16)
    with torch.no_grad():
        logits = model.model(input_ids=ids_NW, use_cache=False).logits[:, :-1].double()
    expected = math.exp(
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids_NW[:, 1:].flatten()).item()
    )
    assert measure(model, tmp_path, batch_size=100)["perplexity/text_files"] == pytest.approx(
        expected, rel=1e-5
    )


def test_the_protocol_is_recorded(model: MoEModel, tmp_path: Path) -> None:
    metrics = measure(model, tmp_path, batch_size=4)
    ids = byte_tokenizer()(TEXT)["input_ids"]
    num_windows = len(ids) // 16
    tokens = struct.pack(f"<{16 * num_windows}q", *ids[: 16 * num_windows])
    record = metrics["protocol/text_files"]
    assert record == {
        "corpus": record["corpus"], "split": "all", "joiner": "\n\n", "window": 16, "stride": 16, "special_tokens": [],
        "num_tokens": 16 * num_windows, "num_predicted_tokens": 15 * num_windows,
        "tokens_sha256": hashlib.sha256(f"({num_windows}, 16)\0".encode() + tokens).hexdigest(),
    }  # fmt: skip
    assert record["corpus"]["corpus"] == "text_files" and len(record["corpus"]["sha256"]) == 64


def test_tokens_that_the_tokenizer_adds_are_recorded(model: MoEModel, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    (tmp_path / "text.txt").write_text(TEXT)
    evaluator = Perplexity(TextFiles([str(tmp_path / "text.txt")], split="all"), window=16, batch_size=4)
    evaluator.prepare(Source(tokenizer))
    assert evaluator(of_model(model)).details["protocols"]["text_files"]["special_tokens"] == [
        "<|endoftext|>"
    ]


def test_the_mean_loss_of_every_window_is_kept(model: MoEModel, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    evaluator = Perplexity(TextFiles([str(tmp_path / "text.txt")], split="all"), window=16, batch_size=3)
    evaluator.prepare(Source(byte_tokenizer()))
    found = evaluator(of_model(model))
    ids = torch.tensor(byte_tokenizer()(TEXT)["input_ids"])
    expected = []
    for window in ids[: len(ids) // 16 * 16].view(-1, 16):
        with torch.no_grad():
            logits = model.model(input_ids=window.unsqueeze(0), use_cache=False).logits[0, :-1].double()
        expected.append(torch.nn.functional.cross_entropy(logits, window[1:]).item())
    losses = found.details["window_losses"]["text_files"]
    assert losses == pytest.approx(expected, rel=1e-5)
    assert found.metrics["perplexity/text_files"] == pytest.approx(
        math.exp(sum(losses) / len(losses)), rel=1e-12
    )


def test_increase_and_its_standard_error_by_hand() -> None:
    """Perplexities 2 and 4: the windows' 4 b - 2 a are 4 log 4 - 2 log 2 - 0.1, ... + 0.1, of standard
    deviation 0.1 * sqrt(2)."""
    dense = {"a": [math.log(2), math.log(2)], "b": [math.log(3)], "of the dense model alone": [1.0]}
    pruned = {"a": [math.log(4) - 0.025, math.log(4) + 0.025], "b": [math.log(3)]}
    found = perplexity_increases(dense, pruned)
    assert found == {
        "perplexity_increase/a": pytest.approx(2.0),
        "perplexity_increase_standard_error/a": pytest.approx(0.1 * math.sqrt(2) / math.sqrt(2)),
        "perplexity_increase/b": 0.0,  # of one window nothing is known about the error
    }


def test_pairing_takes_out_what_windows_have_in_common() -> None:
    """Windows of very different difficulty, all of them raised by the same loss: the error is that of the
    ratio alone."""
    dense = [1.0, 2.0, 3.0, 4.0]
    pruned = [loss + 0.5 for loss in dense]
    increases = perplexity_increases({"a": dense}, {"a": pruned})
    growth = math.exp(3.0) - math.exp(2.5)
    assert increases["perplexity_increase/a"] == pytest.approx(growth)
    assert increases["perplexity_increase_standard_error/a"] == pytest.approx(growth * math.sqrt(5 / 3) / 2)
