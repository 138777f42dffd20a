"""The ragged model is a citizen of transformers: it is tuned, saved, pickled, parametrized, and generates in every
way that the family's own does."""

from __future__ import annotations

import copy
import importlib.util
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedModel,
)

import heapr
from heapr.model.checkpoint import save_checkpoint
from heapr.model.experts.layout import is_ragged
from heapr.model.modelling_file import MODELLING_FILE
from heapr.model.moe import MoEModel, find_moe_layers
from heapr.pruning.surgery import mask, remove
from heapr.types import Plan
from tests.same import ROUNDING, assert_same_model, logits
from tests.tiny import tiny_ids, tiny_model, write_description

IDS_NW = tiny_ids(2, 12)
FAMILIES = ("qwen3_moe", "deepseek")  # transformers' and our own
KEPT_EF = torch.arange(8) < torch.tensor([[0], [8], [3], [5]])


def cut(family: str, how: Any = remove) -> MoEModel:
    model = MoEModel(tiny_model(family))
    how(model, Plan(layers={layer.index: KEPT_EF for layer in model.layers}))
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    original = write_description(path / "original", tiny_model(request.param))
    save_checkpoint(cut(request.param), original, path / "ragged", about={})
    return path / "ragged"


def tuned(model: PreTrainedModel) -> PreTrainedModel:
    """After one step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(input_ids=IDS_NW, labels=IDS_NW, use_cache=False).loss.backward()
    optimizer.step()
    return model


def test_what_is_tuned_and_saved_loads_again(folder: Path, tmp_path: Path) -> None:
    model = tuned(heapr.load_pruned(folder))
    model.save_pretrained(tmp_path / "tuned")
    assert_same_model(heapr.load_pruned(tmp_path / "tuned"), model, IDS_NW)
    code = {path.name for path in folder.glob("*.py")}
    assert MODELLING_FILE in code and {path.name for path in (tmp_path / "tuned").glob("*.py")} == code


def test_the_dense_model_cut_by_a_plan_is_of_the_ragged_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model("qwen3_moe").save_pretrained(tmp_path / "dense")
    plan = Plan(layers=dict.fromkeys((0, 1), KEPT_EF))
    monkeypatch.setattr("heapr.pruning.load_pruned.find_pruning", lambda *_: heapr.types.Pruning(plan))
    model = tuned(heapr.load_pruned(tmp_path / "dense", plan="a plan"))
    model.save_pretrained(tmp_path / "tuned")
    again = heapr.load_pruned(tmp_path / "tuned")
    assert again.config.model_type == "heapr_qwen3_moe" and type(again) is type(model)
    assert_same_model(again, model, IDS_NW)


@pytest.mark.parametrize("form", ["masked", "dense"])
def test_a_tuned_stock_form_of_our_own_family_takes_its_file_along(form: str, tmp_path: Path) -> None:
    model = tuned(cut("deepseek", mask if form == "masked" else lambda *_: None).model)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "deepseek_moe.py").is_file()
    assert model.config.auto_map["AutoModelForCausalLM"] == "deepseek_moe.DeepseekForCausalLM"
    assert_same_model(heapr.load_pruned(tmp_path), model, IDS_NW)


def test_pickle_torch_save_and_copy(folder: Path) -> None:
    model = heapr.load_pruned(folder)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for again in (
        torch.load(buffer, weights_only=False),
        pickle.loads(pickle.dumps(model)),
        copy.deepcopy(model),
    ):
        assert_same_model(again, model, IDS_NW)


def test_a_new_model_of_the_configuration_has_the_familys_random_weights(folder: Path) -> None:
    heapr.load_pruned(folder)  # makes transformers know the type
    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(config)
    for layer in find_moe_layers(model):
        for parameter in layer.experts.parameters():
            assert parameter.std().item() == pytest.approx(config.initializer_range, rel=0.2)


def test_models_without_or_with_another_head(folder: Path) -> None:
    whole = heapr.load_pruned(folder)
    body = AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        found, expected = (each(input_ids=IDS_NW).last_hidden_state for each in (body, whole.model))
    torch.testing.assert_close(found, expected, **ROUNDING)
    if "qwen3" in whole.config.model_type:
        classifier = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
        assert classifier(input_ids=IDS_NW).logits.shape == (2, 3)
        assert torch.equal(
            classifier.model.layers[0].mlp.experts.down_proj, whole.model.layers[0].mlp.experts.down_proj
        )


def test_any_experts_or_attention_implementation_may_be_chosen(folder: Path) -> None:
    model = heapr.load_pruned(folder)
    expected = logits(model, IDS_NW)
    model.set_experts_implementation("eager")
    model.set_attn_implementation("eager")
    assert model.config._experts_implementation == "eager" == model.config._attn_implementation
    torch.testing.assert_close(logits(model, IDS_NW), expected, rtol=1e-4, atol=1e-5)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def test_parametrized_experts_are_ragged_still(folder: Path) -> None:
    """PEFT puts adapters on expert weights this way."""
    model, expected = heapr.load_pruned(folder), heapr.load_pruned(folder)
    experts = find_moe_layers(model)[0].experts
    parametrize.register_parametrization(experts, "down_proj", Doubled())
    with torch.no_grad():
        find_moe_layers(expected)[0].experts.down_proj.mul_(2)
    assert type(experts).__name__ != "RaggedExperts" and is_ragged(experts)
    torch.testing.assert_close(logits(model, IDS_NW), logits(expected, IDS_NW), **ROUNDING)


def test_ragged_experts_are_whole_on_every_device(folder: Path) -> None:
    config = heapr.load_pruned(folder).config
    plans = [plan for plan in (config.base_model_tp_plan, config.base_model_ep_plan) if plan is not None]
    assert not any("experts" in name.split(".")[-2:] for plan in plans for name in plan)
    if "qwen3" in config.model_type:
        assert config.base_model_tp_plan["layers.*.self_attn.q_proj"] == "colwise"


@pytest.mark.parametrize("version", ["4.57.1", "5.2.0"])
def test_an_older_transformers_is_told_so_in_one_line(
    folder: Path, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers, "__version__", version)
    spec = importlib.util.spec_from_file_location("modelling_file_alone", folder / MODELLING_FILE)
    with pytest.raises(ImportError, match=rf"needs transformers 5.16 or newer, and {version} is installed"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def tokens_of(model: PreTrainedModel, **settings: Any) -> Tensor:
    torch.manual_seed(0)
    inputs = {"input_ids": IDS_NW, "attention_mask": torch.ones_like(IDS_NW), **settings}
    return model.generate(**inputs, max_new_tokens=6, min_new_tokens=6)


LEFT_PADDED = torch.ones_like(IDS_NW).index_fill(1, torch.arange(5), 0)
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 20},
    "beams": {"num_beams": 3},
    "left padding": {"attention_mask": LEFT_PADDED},
    "static cache": {"cache_implementation": "static"},
}


@pytest.mark.parametrize("way", WAYS)
def test_it_generates_what_the_masked_model_does(way: str) -> None:
    ragged, masked = (cut("qwen3_moe", how).model for how in (remove, mask))
    assert torch.equal(tokens_of(ragged, **WAYS[way]), tokens_of(masked, **WAYS[way]))


def test_it_generates_with_an_assistant_what_it_generates_alone() -> None:
    ragged, assistant = cut("qwen3_moe").model, tiny_model("qwen3_moe", num_hidden_layers=1)
    one = {"input_ids": IDS_NW[:1], "attention_mask": torch.ones_like(IDS_NW[:1])}
    assert torch.equal(tokens_of(ragged, **one, assistant_model=assistant), tokens_of(ragged, **one))


@pytest.mark.slow
def test_continuous_batching_gives_what_one_batch_does() -> None:
    model = cut("qwen3_moe").model
    expected_NW = tokens_of(model)[:, IDS_NW.shape[1] :]
    blocks = {"num_blocks": 16, "block_size": 4, "max_batch_tokens": 24}
    model.generation_config.eos_token_id = None
    settings = GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=0, **blocks)
    found = model.generate_batch(IDS_NW.tolist(), generation_config=settings, warmup=False)
    answers = [found[request].generated_tokens for request in sorted(found)]
    assert answers == expected_NW.tolist()


@pytest.mark.slow
def test_a_quantized_cache_gives_what_it_gives_the_masked_model() -> None:
    pytest.importorskip(
        "optimum.quanto", reason="optimum-quanto, which compiles code of its own, is not here"
    )
    cache = {"backend": "quanto", "nbits": 4, "residual_length": 4, "q_group_size": 8}
    ragged, masked = (cut("qwen3_moe", how).model for how in (remove, mask))
    settings: dict[str, Any] = {"cache_implementation": "quantized", "cache_config": cache}
    found, expected = tokens_of(ragged, **settings), tokens_of(masked, **settings)
    assert torch.equal(found, expected)
    assert not torch.equal(found, tokens_of(ragged))  # it is in use
