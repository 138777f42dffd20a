"""Generation settings, tokenizers and devices: what is refused before anything is loaded, in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

import heapr
from heapr.errors import ConfigError, NotHereError
from heapr.model.device import find_device
from heapr.model.find_model import find_model
from tests.experiment import write_model
from tests.tiny import VOCABULARY_SIZE, byte_tokenizer, tiny_qwen3_moe


@pytest.mark.parametrize(
    "settings",
    [
        {"num_return_sequences": 2},
        {"max_new_tokens": -1},
        {"early_stopping": 5},
        {"watermarking_config": 3},
        ["a list"],
    ],
    ids=str,
)
def test_generation_settings_that_transformers_refuses_with_the_weights_are_refused_before(
    settings: object, tmp_path: Path
) -> None:
    folder = write_model(tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps(settings))
    with pytest.raises(
        ConfigError, match="generation_config.json in .* cannot be used: .*; correct or remove it"
    ) as caught:
        find_model(str(folder), dtype="float32")
    assert "\n" not in str(caught.value)


def with_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    write_model(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_an_added_token_without_embedding_is_named_and_read_as_text(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    assert tokenizer("a<|pad|>").input_ids[-1] == VOCABULARY_SIZE
    found = find_model(str(with_tokenizer(tmp_path / "model", tokenizer)), dtype="float32").tokenizer
    text = "a<|pad|>b<|endoftext|>"
    without = byte_tokenizer()
    assert found(text).input_ids == without(text).input_ids and found.decode(found(text).input_ids) == text
    assert found.pad_token is None and found.eos_token == "<|endoftext|>"
    assert (
        f"tokens past the model's {VOCABULARY_SIZE} embeddings: '<|pad|>' with id {VOCABULARY_SIZE}; they are"
        " added tokens" in caplog.text
    )


def test_tokens_without_embedding_that_texts_need_are_refused(tmp_path: Path) -> None:
    around = byte_tokenizer()
    around.add_special_tokens({"bos_token": "<|begin|>"})
    around.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", VOCABULARY_SIZE)]
    )
    with pytest.raises(
        ConfigError,
        match=(
            r"'<\|begin\|>' with id 257, which it puts around every text; use the model's own tokenizer, or"
        ),
    ):
        _ = find_model(str(with_tokenizer(tmp_path / "around", around)), dtype="float32").tokenizer
    small = tmp_path / "small"
    tiny_qwen3_moe(vocab_size=250).save_pretrained(small)
    byte_tokenizer().save_pretrained(small)
    with pytest.raises(
        ConfigError,
        match="past the model's 250 embeddings: '.' with id 250 and 6 more; use the model's own tokenizer",
    ):
        _ = find_model(str(small), dtype="float32").tokenizer


@pytest.mark.parametrize("name", ["mps", "xpu", "meta", "hpu:0", "cpu:3", "gpu", "0", "", "cuda:x"])
def test_other_devices_are_refused_by_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=f"runtime.device='{name}' .*choose auto, cpu, cuda or cuda:<number>"
    ) as caught:
        find_device(name)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=f"device='{name}' .*choose auto, cpu"):
        heapr.load_pruned(write_model(tmp_path / "model"), device=name)


def test_devices_that_are_served() -> None:
    assert find_device("cpu") == torch.device("cpu")
    assert find_device("auto").type in {"cpu", "cuda"}
    with pytest.raises(NotHereError, match="but torch sees .* GPUs"):
        find_device("cuda:99")
