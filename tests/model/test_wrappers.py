"""Wrappers, which have a vision tower and the like around a language model: its text decoder is pruned inside
of them, and they are saved and loaded again as wrappers, with everything else as it was."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

import heapr
from heapr.calibration.collector import collect
from heapr.errors import ConfigError
from heapr.model.auto_class import auto_class_name
from heapr.model.checkpoint import save_checkpoint
from heapr.model.find_model import find_model
from heapr.model.moe import MoEModel
from heapr.model.passes import Way
from heapr.pruning.surgery import mask, remove
from heapr.pruning.uniform import make_uniform, uniform_settings
from heapr.score.gradient import Heapr
from tests.model.test_families import random_plan
from tests.oracle import published_scores
from tests.same import assert_same_files, assert_same_statistics, logits
from tests.tiny import byte_tokenizer, no_weights, tiny_ids, tiny_model
from tests.wrappers import WRAPPERS, tiny_wrapper

CPU = torch.device("cpu")
IDS_NW = tiny_ids(num_sequences=2, length=10) % 240 + 1  # none stands for an image
NO_UNIFORM = {
    "ernie4_5_vl_moe",
    "inkling_mm_model",
    "llama4",
}  # no field is the width of the text's experts alone
OTHER_PARTS = ("vision", "visual", "audio", "projector", "resampler", "embed_vision")


def write(folder: Path, model: PreTrainedModel) -> Path:
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def others(model: PreTrainedModel) -> dict[str, Tensor]:
    """What is beside the text decoder."""
    tensors = model.state_dict()
    return {name: tensor for name, tensor in tensors.items() if any(part in name for part in OTHER_PARTS)}


QUICK = {"gemma4", "llama4", "qwen3_vl_moe"}  # of different kinds; make slow tries the others
KINDS = [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in WRAPPERS]


@pytest.mark.parametrize("model_type", KINDS)
def test_the_text_decoder_is_pruned_inside_its_wrapper(model_type: str, tmp_path: Path) -> None:
    dense = tiny_wrapper(model_type)
    source = find_model(str(write(tmp_path / "dense", dense)), dtype="float32")
    model = source.load(CPU)
    assert type(model.model) is type(dense) and not any("vision" in layer.name for layer in model.layers)
    assert torch.equal(logits(model.model, IDS_NW), logits(dense, IDS_NW))
    remove(model, random_plan(model))
    save_checkpoint(model, source.folder, tmp_path / "ragged", about={})
    loaded = heapr.load_pruned(tmp_path / "ragged")
    assert isinstance(loaded, type(dense))
    assert (logits(loaded, IDS_NW) - logits(model.model, IDS_NW)).abs().max() < 1e-6
    pruned, original = others(loaded), others(dense)
    assert pruned.keys() == original.keys() and (len(original) > 3 or model_type == "mistral4")
    assert all(torch.equal(tensor, original[name]) for name, tensor in pruned.items())
    uniform = source.load(CPU)
    if model_type in NO_UNIFORM:
        with pytest.raises(ConfigError, match="use pruning.form=ragged"):
            uniform_settings(source.config, 4)
        mask(uniform, random_plan(uniform, width=4))
    else:
        settings = uniform_settings(source.config, 4)
        remove(uniform, random_plan(uniform, width=4))
        make_uniform(uniform, settings)
    save_checkpoint(uniform, source.folder, tmp_path / "stock", about={})
    assert not list((tmp_path / "stock").glob("*.py"))
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path / "stock", dtype=torch.float32).eval()
    assert type(stock) is type(dense)
    assert (logits(stock, IDS_NW) - logits(uniform.model, IDS_NW)).abs().max() < 1e-6
    assert all(torch.equal(tensor, original[name]) for name, tensor in others(stock).items())


@pytest.mark.parametrize("model_type", ["llama4", "qwen3_vl_moe", "ernie4_5_vl_moe"])
def test_a_wrapper_has_the_oracles_scores_and_streams(model_type: str, tmp_path: Path) -> None:
    dense = tiny_wrapper(model_type)
    source = find_model(str(write(tmp_path / "dense", dense)), dtype="float32")
    model, streamed = source.load(CPU), source.stream(CPU)
    statistics = collect(model, [IDS_NW])
    expected = published_scores(dense, IDS_NW)[:: 2 if model_type == "ernie4_5_vl_moe" else 1]  # text, vision
    scores = Heapr()(statistics, no_weights).layers.values()
    for score_EF, expected_EF in zip(scores, expected, strict=True):
        assert ((score_EF - expected_EF).abs() <= 1e-4 * expected_EF.abs() + 1e-12).all()
    assert_same_statistics(collect(streamed, [IDS_NW], way=Way(streamed.spans)), statistics, 0)
    for name, each in (("in_memory", model), ("streamed", streamed)):
        mask(each, random_plan(each))
        save_checkpoint(each, source.folder, tmp_path / name, about={})
    assert_same_files(tmp_path / "in_memory", tmp_path / "streamed")


def test_a_pruned_wrapper_still_sees(tmp_path: Path) -> None:
    """An image of four patches, which become one token, changes its logits, and alike before and after."""
    dense = tiny_wrapper("qwen3_vl_moe")
    model = MoEModel(dense)
    source = find_model(str(write(tmp_path / "dense", dense)), dtype="float32")
    remove(model, random_plan(model))
    save_checkpoint(model, source.folder, tmp_path / "ragged", about={})
    loaded = heapr.load_pruned(tmp_path / "ragged")
    ids_NW = IDS_NW[:1].clone()
    ids_NW[0, 3] = dense.config.image_token_id
    patches = torch.randn(4, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(0))
    seen = []
    for each, scale in ((model.model, 1), (loaded, 1), (loaded, -1)):
        inputs = {"pixel_values": scale * patches, "image_grid_thw": torch.tensor([[1, 2, 2]])}
        kinds = (ids_NW == dense.config.image_token_id).long()
        with torch.no_grad():
            seen.append(each(input_ids=ids_NW, mm_token_type_ids=kinds, **inputs).logits)
    assert (seen[0] - seen[1]).abs().max() < 1e-5 and (seen[1] - seen[2]).abs().max() > 1e-3


def test_a_folder_that_says_so_holds_the_language_model_alone() -> None:
    text = tiny_model("llama4").config
    assert auto_class_name(text) == "AutoModelForCausalLM"
    whole = tiny_wrapper("llama4").config
    whole.architectures = None
    assert auto_class_name(whole) == "AutoModelForImageTextToText"
    whole.architectures = ["Llama4ForCausalLM"]
    assert auto_class_name(whole) == "AutoModelForCausalLM"


WITHOUT_HEAPR = """
import sys
sys.modules["heapr"] = None  # importing it fails
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
ids_NW = torch.load(sys.argv[2])
for folder in sorted(Path(sys.argv[1]).iterdir()):
    for auto_class in (AutoModelForImageTextToText, AutoModelForCausalLM):
        model = auto_class.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
        with torch.no_grad():
            found = model(input_ids=ids_NW, use_cache=False).logits
        torch.testing.assert_close(found, torch.load(folder / "logits.pt"), rtol=1e-5, atol=2e-6)
    print(folder.name)
"""


@pytest.mark.slow
def test_ragged_wrappers_load_without_heapr(tmp_path: Path) -> None:
    kinds = ["gemma4", "llama4", "mistral4", "qwen3_vl_moe"]
    for model_type in kinds:
        original = write(tmp_path / "originals" / model_type, tiny_wrapper(model_type))
        model = MoEModel(tiny_wrapper(model_type))
        remove(model, random_plan(model))
        save_checkpoint(model, original, tmp_path / "ragged" / model_type, about={})
        torch.save(logits(model.model, IDS_NW), tmp_path / "ragged" / model_type / "logits.pt")
    torch.save(IDS_NW, tmp_path / "ids.pt")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", WITHOUT_HEAPR, str(tmp_path / "ragged"), str(tmp_path / "ids.pt")]
    result = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.split() == kinds


def test_the_language_model_of_a_stock_checkpoint_loads_by_itself(tmp_path: Path) -> None:
    """As that of the original does."""
    source = find_model(str(write(tmp_path / "dense", tiny_wrapper("qwen3_5_moe"))), dtype="float32")
    model = source.load(CPU)
    mask(model, random_plan(model))
    save_checkpoint(model, source.folder, tmp_path / "masked", about={})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "masked", dtype=torch.float32).eval()
    assert (logits(loaded, IDS_NW) - logits(model.model, IDS_NW)).abs().max() < 1e-6
