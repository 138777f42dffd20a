"""Quantised checkpoints, made by hand in the published layouts: loaded whole, in memory and streamed, and
written whole."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3MoeForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

from heapr.errors import ConfigError
from heapr.model.checkpoint import save_checkpoint
from heapr.model.find_model import find_model
from heapr.model.load import ModelSource
from heapr.model.model_files import WEIGHTS
from heapr.model.moe import MoEModel
from heapr.model.quantised import method_of, read_quantization
from heapr.pruning.surgery import mask, remove
from tests.experiment import run_in, write_texts
from tests.model.test_families import random_plan
from tests.same import assert_same_files, logits
from tests.tiny import byte_tokenizer, tiny_ids, tiny_model

CPU = torch.device("cpu")
IDS_NW = tiny_ids(num_sequences=2, length=10)
BLOCK = (5, 12)  # no row or column of a tiny model is a multiple of it
FP8 = {"quant_method": "fp8", "weight_block_size": list(BLOCK), "activation_scheme": "dynamic", "fmt": "e4m3"}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
GROUP = 8  # numbers with one scale
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
    "ignore": ["lm_head", "re:.*mlp.gate$"],
}
FLOAT = {"num_bits": 8, "type": "float", "strategy": "channel"}
PACKED = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP}
NIBBLES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
Tensors = dict[str, Tensor]


def over_blocks(values: Tensor, shape: torch.Size) -> Tensor:
    """Every value for all of its block."""
    return values.repeat_interleave(BLOCK[0], 0).repeat_interleave(BLOCK[1], 1)[: shape[0], : shape[1]]


def eight_bits(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A matrix in 8 bits, the scales of its blocks, and the matrix that they stand for."""
    num_blocks = [-(-length // block) for length, block in zip(weight.shape, BLOCK, strict=True)]
    scales = torch.empty(num_blocks)
    for row in range(num_blocks[0]):
        for column in range(num_blocks[1]):
            block = weight[row * BLOCK[0] :, column * BLOCK[1] :][: BLOCK[0], : BLOCK[1]]
            scales[row, column] = block.abs().max() / 448
    eight = (weight / over_blocks(scales, weight.shape)).to(torch.float8_e4m3fn)
    return eight, scales, eight.float() * over_blocks(scales, weight.shape)


def write_fp8(folder: Path, family: str) -> Tensors:
    """A checkpoint as DeepSeek-V3's and Qwen3's: all matrices of layers but routers. Returns what it stands
    for."""
    tiny_model(family).save_pretrained(folder)
    weights = load_file(folder / WEIGHTS)
    files, whole = dict(weights), dict(weights)
    for name, weight in weights.items():
        if (".layers." in name and name.endswith("_proj.weight")) or "kv_a_proj" in name:
            files[name], scales, whole[name] = eight_bits(weight)
            files[f"{name}_scale_inv"] = scales
    finish(folder, files, FP8)
    return whole


def write_mxfp4(folder: Path, family: str) -> Tensors:
    """A checkpoint as gpt-oss': experts in blocks of 32 numbers of 4 bits, with one exponent each."""
    model = tiny_model(family, hidden_size=32, intermediate_size=32, head_dim=16)
    model.save_pretrained(folder)
    weights = load_file(folder / WEIGHTS)
    files, whole = dict(weights), dict(weights)
    values = torch.tensor([*NIBBLES, *(-value for value in NIBBLES)])
    for name, weight in weights.items():
        if name.endswith(("gate_up_proj", "down_proj")) and "experts" in name:
            num_experts, num_in, num_out = weight.shape
            nibbles = torch.randint(16, (num_experts, num_out, num_in // 32, 32))
            exponents = torch.randint(120, 126, nibbles.shape[:-1])
            stands_for = values[nibbles] * torch.exp2(exponents - 127.0).unsqueeze(-1)
            whole[name] = stands_for.flatten(2).transpose(1, 2).contiguous()
            files[f"{name}_blocks"] = (nibbles[..., 0::2] + 16 * nibbles[..., 1::2]).to(torch.uint8)
            files[f"{name}_scales"] = exponents.to(torch.uint8)
            del files[name]
    finish(folder, files, MXFP4)
    return whole


def write_float_quantized(folder: Path, family: str) -> Tensors:
    """compressed-tensors of 8 bits: a scale for each row. Returns what it stands for."""
    weights = compressible(folder, family)
    files, whole = dict(weights), dict(weights)
    for name, weight in matrices(weights).items():
        scales = weight.abs().amax(dim=1, keepdim=True) / 448
        files[name] = (weight / scales).to(torch.float8_e4m3fn)
        files[f"{name}_scale"] = scales
        whole[name] = files[name].float() * scales
    tokens = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": FLOAT, "input_activations": tokens}
    finish(folder, files, COMPRESSED | {"format": "float-quantized", "config_groups": {"group_0": group}})
    return whole


def write_pack_quantized(folder: Path, family: str) -> Tensors:
    """compressed-tensors of 4 bits: eight numbers in an int32, the first in the lowest bits. Returns what it
    stands for."""
    weights = compressible(folder, family)
    files, whole = dict(weights), dict(weights)
    for name, weight in matrices(weights).items():
        groups = weight.unflatten(1, (-1, GROUP))
        scales = groups.abs().amax(dim=2) / 7
        integers = (groups / scales.unsqueeze(2)).round()
        whole[name] = (integers * scales.unsqueeze(2)).flatten(1)
        nibbles = (integers + 8).flatten(1).to(torch.uint8)
        eight_bits_each = nibbles[:, 0::2] + 16 * nibbles[:, 1::2]
        files[f"{name}_packed"] = eight_bits_each.view(torch.int32)
        files[f"{name}_scale"] = scales
        files[f"{name}_shape"] = torch.tensor(weight.shape)
        del files[name]
    group = {"targets": ["Linear"], "weights": PACKED}
    finish(folder, files, COMPRESSED | {"format": "pack-quantized", "config_groups": {"group_0": group}})
    return whole


def compressible(folder: Path, family: str) -> Tensors:
    """The weights of a tiny model whose configuration is in the folder; without the package, the test skips."""
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    tiny_model(family).save_pretrained(folder)
    return load_file(folder / WEIGHTS)


def matrices(weights: Tensors) -> Tensors:
    """Those of attention and of experts."""
    return {name: weight for name, weight in weights.items() if name.endswith("_proj.weight")}


def finish(folder: Path, files: Tensors, quantization: Mapping[str, Any]) -> None:
    save_file(files, folder / WEIGHTS, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": dict(quantization)}))
    byte_tokenizer().save_pretrained(folder)


def expected_model(
    folder: Path, whole: Tensors, unquantised: Path, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """The model that was quantised, with the numbers that 8 or 4 bits leave of it."""
    unquantised.mkdir()
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config")
    (unquantised / "config.json").write_text(json.dumps(config))
    save_file(whole, unquantised / WEIGHTS, {"format": "pt"})
    return AutoModelForCausalLM.from_pretrained(unquantised, dtype=dtype).eval()


KINDS: dict[str, tuple[str, Callable[[Path, str], Tensors]]] = {
    "DeepSeek-V3's fp8": ("deepseek_v3", write_fp8),
    "Qwen3's fp8": ("qwen3_moe", write_fp8),
    "gpt-oss' mxfp4": ("gpt_oss", write_mxfp4),
    "compressed-tensors' float-quantized": ("qwen3_moe", write_float_quantized),
    "compressed-tensors' pack-quantized": ("qwen3_moe", write_pack_quantized),
}


@pytest.mark.parametrize("kind", KINDS)
def test_quantised_weights_are_loaded_and_written_whole(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In memory and streamed: the numbers that were quantised; pruned checkpoints without a trace of it."""
    caplog.set_level("INFO")
    family, write = KINDS[kind]
    folder = tmp_path / "model"
    expected = expected_model(folder, write(folder, family), tmp_path / "whole").state_dict()
    source = find_model(str(folder), dtype="float32")
    loaded, streamed = source.load(CPU), source.stream(CPU)
    assert caplog.text.count("are dequantised to float32 as they are loaded") == 1
    tensors = loaded.model.state_dict()
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())
    with streamed.hold(range(len(streamed.decoder_layers))):
        tensors = streamed.model.state_dict()
        assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())
    plan = random_plan(loaded)
    for name, model in (("in_memory", loaded), ("streamed", streamed)):
        mask(model, plan)
        save_checkpoint(model, folder, tmp_path / name, about={})
    assert_same_files(tmp_path / "in_memory", tmp_path / "streamed")
    ragged = source.load(CPU)
    remove(ragged, plan)
    save_checkpoint(ragged, folder, tmp_path / "ragged", about={})
    before = logits(ragged.model, IDS_NW)
    for name in ("in_memory", "ragged"):
        written: ModelSource = find_model(str(tmp_path / name), dtype=None)
        assert written.quantization is None and written.remarks == []
        assert "quantization_config" not in (tmp_path / name / "config.json").read_text()
        assert (logits(written.load(CPU).model, IDS_NW) - before).abs().max() < 1e-4


@pytest.mark.parametrize("family", ["deepseek_v3", "ernie4_5_moe"])
def test_what_a_family_keeps_in_float32_stays_so(family: str, tmp_path: Path) -> None:
    """The correction of the router's choice, and ERNIE's whole router, in a model that is bfloat16 otherwise."""
    folder = tmp_path / "model"
    whole = write_fp8(folder, family)
    expected = expected_model(folder, whole, tmp_path / "whole", torch.bfloat16).state_dict()
    tensors = find_model(str(folder), dtype="bfloat16").load(CPU).model.state_dict()
    assert {tensor.dtype for tensor in expected.values()} == {torch.bfloat16, torch.float32}
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())
    assert {name: tensor.dtype for name, tensor in tensors.items()} == {
        name: tensor.dtype for name, tensor in expected.items()
    }
    streamed = find_model(str(folder), dtype="bfloat16").stream(CPU)
    with streamed.hold(range(len(streamed.decoder_layers))):
        tensors = streamed.model.state_dict()
        assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())
        assert all(tensors[name].dtype == tensor.dtype for name, tensor in expected.items())
    assert AUTO_QUANTIZER_MAPPING["fp8"] is FineGrainedFP8HfQuantizer, "transformers is left as it was"


def test_what_is_float32_only_once_it_is_loaded_is_read_as_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A class may ask for float32 where its new parameters are bfloat16; no family here does it for matrices."""
    monkeypatch.setattr(Qwen3MoeForCausalLM, "_keep_in_fp32_modules_strict", {"gate"})
    monkeypatch.setattr(MoEModel, "check_head", lambda _: None)  # Qwen3's code cannot run such a router
    whole = write_fp8(tmp_path / "model", "qwen3_moe")
    expected = expected_model(tmp_path / "model", whole, tmp_path / "whole", torch.bfloat16).state_dict()
    tensors = find_model(str(tmp_path / "model"), dtype="bfloat16").load(CPU).model.state_dict()
    router = "model.layers.0.mlp.gate.weight"
    assert tensors[router].dtype == torch.float32
    assert not torch.equal(tensors[router], tensors[router].bfloat16().float())
    assert torch.equal(tensors[router], expected[router])


def test_the_weights_of_a_part_may_be_quantised(tmp_path: Path) -> None:
    """Of a model whose text part has a configuration of its own."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"model_type": "outer", "text_config": {"quantization_config": FP8}}))
    found = read_quantization(tmp_path)
    assert found == FP8 and method_of(found) == "fp8"
    file.write_text(json.dumps({"text_config": {"quantization_config": None}, "vision_config": {}}))
    assert read_quantization(tmp_path) is None
    file.write_text(json.dumps({"text_config": {"quantization_config": {}}}))
    with pytest.raises(ConfigError, match="has an empty quantization_config; remove this field"):
        read_quantization(tmp_path)


def test_a_run_says_what_it_dequantises_and_the_card_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    write_fp8(tmp_path / "model", "qwen3_moe")
    unmeasured = [f"evaluation.{name}=null" for name in ("perplexity", "throughput", "truth", "fidelity")]
    overrides = ["model=hf", f"model.path={tmp_path / 'model'}", *write_texts(tmp_path), *unmeasured]
    summary = run_in(tmp_path, *overrides, "evaluation.efficiency=null")
    assert "the weights are quantised (fp8): they are dequantised to bfloat16" in caplog.text
    folder = next(Path(stage["path"]) for stage in summary.stages if stage["stage"] == "prune") / "checkpoint"
    assert "The original weights are quantised (fp8)." in (folder / "README.md").read_text()
    assert json.loads((folder / "config.json").read_text())["heapr"]["dequantised_from"] == "fp8"


def test_what_cannot_be_dequantised_is_refused_in_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write_fp8(folder, "qwen3_moe")
    files = load_file(folder / WEIGHTS)
    scale = "model.layers.1.mlp.experts.2.down_proj.weight_scale_inv"
    save_file({name: tensor for name, tensor in files.items() if name != scale}, folder / WEIGHTS)
    with pytest.raises(ConfigError, match=r"are quantised \(fp8\), and .*|do not fit its config.json"):
        _ = find_model(str(folder), dtype="float32").remarks
    attention = "model.layers.1.self_attn.q_proj.weight_scale_inv"
    save_file({name: tensor for name, tensor in files.items() if name != attention}, folder / WEIGHTS)
    with pytest.raises(ConfigError, match=r"and model.layers.1.self_attn.q_proj.weight has no scale"):
        _ = find_model(str(folder), dtype="float32").remarks
    save_file(files | {"model.layers.0.mlp.experts.gate_up_proj_scale_inv": torch.ones(2)}, folder / WEIGHTS)
    with pytest.raises(
        ConfigError, match=r"transformers does not use .*gate_up_proj_scale_inv to dequantise"
    ):
        _ = find_model(str(folder), dtype="float32").remarks


@pytest.mark.skipif(
    importlib.util.find_spec("compressed_tensors") is not None, reason="compressed-tensors is installed"
)
def test_a_missing_package_is_named(tmp_path: Path) -> None:
    tiny_model("qwen3_moe").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "compressed-tensors"}})
    )
    with pytest.raises(
        ConfigError,
        match=r"\(compressed-tensors\), and dequantising them needs a package .*compressed-tensors",
    ) as caught:
        find_model(str(tmp_path), dtype="float32")
    assert "\n" not in str(caught.value)
