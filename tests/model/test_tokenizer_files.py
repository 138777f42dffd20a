"""The tokenizer and generation settings of a checkpoint: nothing lost, readable by older versions too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from heapr.model.checkpoint import save_checkpoint
from heapr.model.description import copy_tokenizer
from heapr.model.find_model import find_model
from heapr.pruning.surgery import remove
from heapr.types import Plan
from tests.experiment import run_in, write_texts
from tests.tiny import byte_tokenizer, tiny_qwen3_moe

DEFAULT, RAG = "{{ messages[0].content }}", "rag {{ messages[0].content }}"


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "tokenizer_config.json").read_text())


def copied(original: Path) -> Path:
    folder = original.parent / "copy"
    folder.mkdir()
    copy_tokenizer(original, folder)
    return folder


def test_names_of_transformers_5_become_those_that_all_versions_read(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["a\u0121", "ö"]})
    tokenizer.save_pretrained(tmp_path / "new")
    before = config_of(tmp_path / "new")
    assert before["tokenizer_class"] == "TokenizersBackend" and before["extra_special_tokens"] == [
        "a\u0121",
        "ö",
    ]
    folder = copied(tmp_path / "new")
    assert config_of(tmp_path / "new") == before
    expected = {name: value for name, value in before.items() if name != "extra_special_tokens"}
    changed = {"tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": ["a\u0121", "ö"]}
    assert config_of(folder) == {**expected, **changed}
    assert (folder / "tokenizer.json").read_bytes() == (tmp_path / "new" / "tokenizer.json").read_bytes()
    one, other = AutoTokenizer.from_pretrained(tmp_path / "new"), AutoTokenizer.from_pretrained(folder)
    text = "a\u0121 text, ö<|endoftext|>"
    assert other(text).input_ids == one(text).input_ids
    assert other.all_special_tokens == one.all_special_tokens and "ö" in other.all_special_tokens


@pytest.mark.parametrize(
    "config",
    [
        {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|endoftext|>", "model_max_length": 512},
        {"tokenizer_class": "PreTrainedTokenizerFast", "extra_special_tokens": {"image_token": "ö"}},
    ],
)
def test_other_files_keep_their_bytes(config: dict[str, Any], tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path / "old")
    text = json.dumps(config, indent=7)
    (tmp_path / "old" / "tokenizer_config.json").write_text(text)
    assert (copied(tmp_path / "old") / "tokenizer_config.json").read_text() == text


@pytest.mark.parametrize("templates", [DEFAULT, {"default": DEFAULT, "rag": RAG}])
@pytest.mark.parametrize("is_inside", [False, True])
def test_chat_templates_are_kept(templates: str | dict[str, str], is_inside: bool, tmp_path: Path) -> None:
    """As files, and inside tokenizer_config.json as older versions wrote them."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None if is_inside else templates
    original = tmp_path / "model"
    tokenizer.save_pretrained(original)
    if is_inside:
        named = templates
        if isinstance(templates, dict):
            named = [{"name": name, "template": template} for name, template in templates.items()]
        (original / "tokenizer_config.json").write_text(
            json.dumps({**config_of(original), "chat_template": named})
        )
    assert AutoTokenizer.from_pretrained(copied(original)).chat_template == templates


def test_a_named_template_belongs_to_the_models_identity(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = {"default": DEFAULT, "rag": RAG}
    tokenizer.save_pretrained(tmp_path)
    tiny_qwen3_moe().save_pretrained(tmp_path)
    before = find_model(str(tmp_path), dtype="float32").identity
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("another")
    assert find_model(str(tmp_path), dtype="float32").identity != before


def test_a_tokenizer_without_any_special_token_serves(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tiny_qwen3_moe().save_pretrained(folder)
    bare = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer().backend_tokenizer)
    assert [bare.pad_token, bare.eos_token, bare.unk_token, bare.bos_token] == [None] * 4
    bare.save_pretrained(folder)
    texts = [
        override for override in write_texts(tmp_path) if override.startswith(("calibration", "evaluation/"))
    ]
    summary = run_in(
        tmp_path, "model=hf", f"model.path={folder}", "model.dtype=float32", *texts,
        f"evaluation.corpora.text_files.paths=[{tmp_path / 'test.txt'}]",
        "evaluation/evaluators@evaluation=[perplexity,generation]", "evaluation.perplexity.window=32",
        "evaluation.generation.num_prompts=2", "evaluation.generation.prompt_length=8", "evaluation.generation.new_tokens=16",
    )  # fmt: skip
    assert summary.metrics["dense"]["length_greedy/text_files"] <= 16
    (checkpoint,) = (tmp_path / "outputs").glob("artifacts/prune/*/checkpoint")
    assert AutoTokenizer.from_pretrained(checkpoint)("abc").input_ids == bare("abc").input_ids


@pytest.mark.parametrize("is_ragged", [False, True])
def test_generation_settings_that_cannot_be_saved_are_copied(is_ragged: bool, tmp_path: Path) -> None:
    """transformers refuses to write a temperature without sampling once the settings have been changed."""
    original = tmp_path / "model"
    tiny_qwen3_moe().save_pretrained(original)
    byte_tokenizer().save_pretrained(original)
    settings = '{"do_sample": false, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [0, 5]}'
    (original / "generation_config.json").write_text(settings)
    source = find_model(str(original), dtype="float32")
    model = source.load(torch.device("cpu"))
    model.model.generation_config.top_k = 3
    with pytest.raises(ValueError, match="Fix these issues"):
        model.model.generation_config.save_pretrained(tmp_path / "refused")
    if is_ragged:
        kept_EF = torch.arange(8).expand(4, 8) < 5
        remove(model, Plan(layers={layer.index: kept_EF for layer in model.layers}))
    held = model.model.generation_config
    save_checkpoint(model, original, tmp_path / "pruned", about={})
    assert (tmp_path / "pruned" / "generation_config.json").read_text() == settings
    assert model.model.generation_config is held
    assert GenerationConfig.from_pretrained(tmp_path / "pruned").eos_token_id == [0, 5]
