"""One decoder layer's weights at a time, read from the files; every family: test_families.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from heapr.errors import ConfigError
from heapr.model.find_model import find_model
from heapr.model.load import ModelSource
from heapr.model.model_files import WEIGHTS
from heapr.model.weights import BESIDE, LayerWeights
from tests.tiny import byte_tokenizer, deep_model, tiny_model

CPU = torch.device("cpu")


def stored(folder: Path, *, max_shard_size: str = "5GB") -> ModelSource:
    tiny_model("qwen3_moe", num_hidden_layers=3).save_pretrained(folder, max_shard_size=max_shard_size)
    byte_tokenizer().save_pretrained(folder)
    return find_model(str(folder), dtype="float32")


def weights_of(source: ModelSource) -> tuple[torch.nn.Module, LayerWeights]:
    model = source.on_meta().model
    return model, LayerWeights(model, "model.layers", source.folder, CPU)


@pytest.mark.parametrize("max_shard_size", ["5GB", "8KB"])
def test_a_layer_is_what_from_pretrained_makes_of_it_and_again_after_its_release(
    tmp_path: Path, max_shard_size: str
) -> None:
    source = stored(tmp_path, max_shard_size=max_shard_size)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    model, weights = weights_of(source)
    for _ in range(2):
        for layer in range(weights.num_layers):
            weights.load(layer)
            for name, tensor in model.model.layers[layer].state_dict().items():
                assert torch.equal(tensor, expected.model.layers[layer].state_dict()[name])
            weights.release(layer)
            assert all(parameter.is_meta for parameter in model.model.layers[layer].parameters())
    assert torch.equal(model.lm_head.weight, expected.lm_head.weight)
    assert torch.equal(model.model.rotary_emb.inv_freq, expected.model.rotary_emb.inv_freq)
    in_layers = sum(weights.num_bytes(layer) for layer in range(3))
    assert weights.shards.bytes_read == 2 * in_layers + weights.num_bytes(BESIDE)


def test_weights_come_in_the_dtype_that_is_asked_for(tmp_path: Path) -> None:
    stored(tmp_path)
    model, weights = weights_of(find_model(str(tmp_path), dtype="bfloat16"))
    weights.load(1)
    assert {parameter.dtype for parameter in model.model.layers[1].parameters()} == {torch.bfloat16}


def test_tied_heads_stay_tied(tmp_path: Path) -> None:
    tiny_model("qwen3_moe", tie_word_embeddings=True).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    model, _ = weights_of(find_model(str(tmp_path), dtype="float32"))
    assert model.lm_head.weight is model.model.embed_tokens.weight and not model.lm_head.weight.is_meta


def test_a_tensor_that_is_missing_in_a_late_layer_is_found_before_the_first(tmp_path: Path) -> None:
    source = stored(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    del tensors["model.layers.2.mlp.experts.1.up_proj.weight"]
    save_file(tensors, tmp_path / WEIGHTS, {"format": "pt"})
    with pytest.raises(ConfigError, match="do not fit its config.json"):
        weights_of(source)


def test_files_that_change_meanwhile_are_refused(tmp_path: Path) -> None:
    source = stored(tmp_path)
    _, weights = weights_of(source)
    weights.load(0)
    tiny_model("qwen3_moe", seed=1, num_hidden_layers=3).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="model.safetensors' has changed while it was in use"):
        weights.load(1)


def test_numbers_that_are_no_weights_are_read_too(tmp_path: Path) -> None:
    """A table of token numbers, which routes by hash."""
    deep_model("deepseek_v4").save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    source = find_model(str(tmp_path), dtype="bfloat16")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    model, weights = weights_of(source)
    weights.load(0)
    found, wanted = model.model.layers[0].state_dict(), expected.model.layers[0].state_dict()
    assert any(not tensor.is_floating_point() for tensor in found.values())
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.items())
    assert all(tensor.dtype == wanted[name].dtype for name, tensor in found.items())
