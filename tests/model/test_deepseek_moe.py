"""DeepSeekMoE against slow oracles written from its description, and its checkpoints in the original
format."""

from __future__ import annotations

import ast
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel, dynamic_module_utils
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from heapr.errors import ConfigError
from heapr.model import deepseek_moe
from heapr.model.deepseek_moe import (
    DeepseekForCausalLM,
    DeepseekMoeBlock,
    DeepseekMoeConfig,
    DeepseekMoeModel,
    DeepseekMoeRouter,
)
from heapr.model.experts.loop import run_experts
from heapr.model.find_model import find_model
from heapr.model.moe import find_moe_layers
from tests.deepseek import CONFIG_16B, TINY, write_original_folder
from tests.same import assert_same_model
from tests.tiny import byte_tokenizer, tiny_ids, tiny_model

Weights = dict[str, Tensor]


def slow_mlp(x_D: Tensor, weights: Weights, name: str) -> Tensor:
    gate_F, up_F = (weights[f"{name}.{matrix}_proj.weight"] @ x_D for matrix in ("gate", "up"))
    return weights[f"{name}.down_proj.weight"] @ (gate_F / (1 + torch.exp(-gate_F)) * up_F)


def slow_router(x_D: Tensor, weight_ED: Tensor, config: dict) -> dict[int, float]:
    """Router weight of each chosen expert."""
    exponentials = [math.exp(float(row_D @ x_D)) for row_D in weight_ED]
    chosen = sorted(range(len(exponentials)), key=lambda expert: -exponentials[expert])[
        : config["num_experts_per_tok"]
    ]
    total = sum(exponentials[expert] for expert in chosen) if config["norm_topk_prob"] else sum(exponentials)
    return {expert: exponentials[expert] / total for expert in chosen}


def slow_block(x_D: Tensor, weights: Weights, name: str, config: dict) -> Tensor:
    output_D = slow_mlp(x_D, weights, f"{name}.shared_experts")
    for expert, router_weight in slow_router(x_D, weights[f"{name}.gate.weight"], config).items():
        output_D = output_D + router_weight * slow_mlp(x_D, weights, f"{name}.experts.{expert}")
    return output_D


def slow_norm(x_D: Tensor, weight_D: Tensor) -> Tensor:
    return weight_D * x_D / torch.sqrt((x_D**2).mean() + 1e-6)


def slow_rotate(vector: Tensor, position: float, theta: float) -> Tensor:
    """Turns the pair (j, j + half) of a head by position * theta^(-j / half)."""
    half, turned = len(vector) // 2, vector.clone()
    for j in range(half):
        angle = position * theta ** (-j / half)
        turned[j] = vector[j] * math.cos(angle) - vector[j + half] * math.sin(angle)
        turned[j + half] = vector[j] * math.sin(angle) + vector[j + half] * math.cos(angle)
    return turned


def slow_attention(hidden: list[Tensor], weights: Weights, name: str, config: dict) -> list[Tensor]:
    heads, shared_by = (
        config["num_attention_heads"],
        config["num_attention_heads"] // config["num_key_value_heads"],
    )
    size, stretch = config["hidden_size"] // heads, (config["rope_scaling"] or {"factor": 1.0})["factor"]
    q, k, v = (
        [(weights[f"{name}.{matrix}_proj.weight"] @ x_D).split(size) for x_D in hidden] for matrix in "qkv"
    )
    outputs = []
    for now in range(len(hidden)):
        parts = []
        for head in range(heads):
            query = slow_rotate(q[now][head], now / stretch, config["rope_theta"])
            keys = [
                slow_rotate(k[past][head // shared_by], past / stretch, config["rope_theta"])
                for past in range(now + 1)
            ]
            attention = torch.softmax(torch.stack([query @ key for key in keys]) / math.sqrt(size), dim=0)
            parts.append(sum(a * v[past][head // shared_by] for past, a in enumerate(attention)))
        outputs.append(weights[f"{name}.o_proj.weight"] @ torch.cat(parts))
    return outputs


def slow_logits(tensors: Weights, config: dict, ids_W: Tensor) -> Tensor:
    """Logits (W, V) of one sequence, position by position, head by head, token by token and expert by expert,
    in float64."""
    weights = {name: tensor.double() for name, tensor in tensors.items()}
    hidden = [weights["model.embed_tokens.weight"][token] for token in ids_W]
    for index in range(config["num_hidden_layers"]):
        name = f"model.layers.{index}"
        normed = [slow_norm(x_D, weights[f"{name}.input_layernorm.weight"]) for x_D in hidden]
        attended = slow_attention(normed, weights, f"{name}.self_attn", config)
        hidden = [x_D + a_D for x_D, a_D in zip(hidden, attended, strict=True)]
        normed = [slow_norm(x_D, weights[f"{name}.post_attention_layernorm.weight"]) for x_D in hidden]
        if index >= config["first_k_dense_replace"] and index % config["moe_layer_freq"] == 0:
            hidden = [
                x_D + slow_block(n_D, weights, f"{name}.mlp", config)
                for x_D, n_D in zip(hidden, normed, strict=True)
            ]
        else:
            hidden = [
                x_D + slow_mlp(n_D, weights, f"{name}.mlp") for x_D, n_D in zip(hidden, normed, strict=True)
            ]
    return torch.stack(
        [weights["lm_head.weight"] @ slow_norm(x_D, weights["model.norm.weight"]) for x_D in hidden]
    )


@pytest.fixture
def no_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run remote code"))


@pytest.fixture
def deepseek() -> PreTrainedModel:
    return tiny_model("deepseek")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm_topk_prob": True},
        {"num_hidden_layers": 5, "first_k_dense_replace": 2, "moe_layer_freq": 2, "n_shared_experts": 1},
        {"num_key_value_heads": 1, "rope_scaling": {"type": "linear", "factor": 2.0}},
    ],
    ids=lambda changes: " ".join(changes) or "as in the 16B",
)
def test_a_folder_in_the_original_format_has_the_logits_of_the_description(
    tmp_path: Path, changes: dict
) -> None:
    config, tensors = write_original_folder(tmp_path / "model", **changes)
    deepseek_moe.register()
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.float64, experts_implementation="eager"
    )
    ids_NW = tiny_ids(2, 10)
    with torch.no_grad():
        logits_NWV = model(input_ids=ids_NW, use_cache=False).logits
    expected_NWV = torch.stack([slow_logits(tensors, config, ids_W) for ids_W in ids_NW])
    torch.testing.assert_close(logits_NWV, expected_NWV, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("trust_remote_code", [None, False, True])
@pytest.mark.usefixtures("no_questions")
def test_remote_code_is_neither_asked_for_nor_run(tmp_path: Path, trust_remote_code: bool | None) -> None:
    folder = tmp_path / "model"
    write_original_folder(folder)
    deepseek_moe.register()
    deepseek_moe.register()
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    assert type(config) is DeepseekMoeConfig and config.rope_parameters["rope_theta"] == 500.0
    assert (
        type(AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code))
        is DeepseekForCausalLM
    )
    for auto_class, model_class in (
        (AutoModelForCausalLM, DeepseekForCausalLM),
        (AutoModel, DeepseekMoeModel),
    ):
        model, found = auto_class.from_pretrained(
            folder, trust_remote_code=trust_remote_code, output_loading_info=True
        )
        assert type(model) is model_class and not found["missing_keys"] and not found["mismatched_keys"]


def test_saving_writes_the_original_names_and_values(tmp_path: Path) -> None:
    config, tensors = write_original_folder(tmp_path / "model")
    deepseek_moe.register()
    AutoModelForCausalLM.from_pretrained(tmp_path / "model").save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert saved.keys() == tensors.keys()
    assert all(torch.equal(saved[name], tensors[name]) for name in tensors)
    rewritten = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert rewritten["auto_map"]["AutoModelForCausalLM"] == "deepseek_moe.DeepseekForCausalLM"
    assert (tmp_path / "saved" / "deepseek_moe.py").is_file()
    renamed = {
        "architectures",
        "auto_map",
        "torch_dtype",
        "rope_theta",
        "rope_scaling",
        "transformers_version",
    }
    assert {name: rewritten[name] for name in config.keys() - renamed} == {
        name: config[name] for name in config.keys() - renamed
    }
    assert AutoConfig.from_pretrained(tmp_path / "saved").rope_parameters == {
        "rope_theta": 500.0,
        "rope_type": "default",
    }


def test_a_model_made_here_is_saved_expert_by_expert(deepseek: PreTrainedModel, tmp_path: Path) -> None:
    deepseek.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "model.layers.2.mlp.experts.3.up_proj.weight" in names and not any(
        "gate_up" in name for name in names
    )
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(deepseek.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("norm_topk_prob", [False, True])
def test_router_weights_are_probabilities_among_all_experts_unless_renormalised(norm_topk_prob: bool) -> None:
    router = (
        DeepseekMoeRouter(DeepseekMoeConfig(**TINY, norm_topk_prob=norm_topk_prob))
        .double()
        .requires_grad_(False)
    )
    torch.manual_seed(0)
    torch.nn.init.normal_(router.weight)
    hidden_TD = torch.randn(20, 16, dtype=torch.float64)
    _, weight_TK, expert_TK = router(hidden_TD)
    for x_D, weight_K, expert_K in zip(hidden_TD, weight_TK, expert_TK, strict=True):
        expected = slow_router(x_D, router.weight, {**TINY, "norm_topk_prob": norm_topk_prob})
        assert dict(zip(expert_K.tolist(), weight_K.tolist(), strict=True)) == pytest.approx(
            expected, rel=1e-5
        )
    sums_T = weight_TK.sum(dim=1)
    assert (sums_T - 1).abs().max() < 1e-6 if norm_topk_prob else (sums_T < 0.999).any()


def test_a_single_expert_keeps_its_probability() -> None:
    router = DeepseekMoeRouter(DeepseekMoeConfig(**{**TINY, "num_experts_per_tok": 1}, norm_topk_prob=True))
    torch.nn.init.zeros_(router.weight)
    assert torch.equal(router(torch.ones(3, 16))[1], torch.full((3, 1), 0.25))


@pytest.mark.parametrize("norm_topk_prob", [False, True])
def test_a_bfloat16_router_rounds_probabilities_before_it_chooses_as_the_original_does(
    norm_topk_prob: bool,
) -> None:
    """Logits so near to each other that in bfloat16 many experts have the same probability."""
    sizes = {"n_routed_experts": 64, "num_experts_per_tok": 6, "norm_topk_prob": norm_topk_prob}
    router = DeepseekMoeRouter(DeepseekMoeConfig(**{**TINY, **sizes})).bfloat16()
    torch.manual_seed(0)
    torch.nn.init.normal_(router.weight, std=0.01)
    logits_TE, weight_TK, expert_TK = router(torch.randn(50, 16, dtype=torch.bfloat16))
    assert logits_TE.dtype == weight_TK.dtype == torch.bfloat16
    probability_TE = logits_TE.softmax(dim=-1)
    largest_TK, original_TK = torch.topk(probability_TE, k=6, dim=-1, sorted=False)
    assert torch.equal(expert_TK.sort(dim=1).values, original_TK.sort(dim=1).values)
    in_float32_TK = logits_TE.float().softmax(dim=-1).topk(6).indices
    differs_T = (expert_TK.sort(dim=1).values != in_float32_TK.sort(dim=1).values).any(dim=1)
    assert differs_T.float().mean() > 0.2, "the case is about ties"
    expected_TK = probability_TE.gather(1, expert_TK)
    if norm_topk_prob:
        expected_TK = expected_TK / (largest_TK.sum(dim=-1, keepdim=True) + 1e-20)
    torch.testing.assert_close(weight_TK, expected_TK, rtol=2**-7 if norm_topk_prob else 0, atol=0)


def test_the_block_is_the_weighted_routed_experts_plus_the_shared_mlp() -> None:
    torch.manual_seed(0)
    config = DeepseekMoeConfig(**TINY)
    config._experts_implementation = "eager"
    block = DeepseekMoeBlock(config).double().requires_grad_(False)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    weights = {f"mlp.{name}": tensor for name, tensor in block.state_dict().items()}
    for expert in range(4):
        gate_up_FD, name = block.experts.gate_up_proj[expert], f"mlp.experts.{expert}"
        weights.update({f"{name}.gate_proj.weight": gate_up_FD[:8], f"{name}.up_proj.weight": gate_up_FD[8:]})
        weights[f"{name}.down_proj.weight"] = block.experts.down_proj[expert]
    assert weights["mlp.shared_experts.up_proj.weight"].shape == (2 * 8, 16)
    hidden_NWD = torch.randn(2, 7, 16, dtype=torch.float64)
    expected = [
        slow_block(x_D, weights, "mlp", {**TINY, "norm_topk_prob": False}) for x_D in hidden_NWD.flatten(0, 1)
    ]
    torch.testing.assert_close(block(hidden_NWD), torch.stack(expected).view(2, 7, 16), rtol=1e-5, atol=1e-6)


def test_only_layers_after_the_first_dense_ones_and_at_the_frequency_have_experts() -> None:
    assert [layer.index for layer in find_moe_layers(tiny_model("deepseek"))] == [1, 2]
    sparse = tiny_model("deepseek", num_hidden_layers=8, first_k_dense_replace=3, moe_layer_freq=2)
    assert [layer.index for layer in find_moe_layers(sparse)] == [4, 6]
    assert sparse.model.layers[0].mlp.up_proj.weight.shape == (24, 16)


def test_numbers_of_the_16b_model() -> None:
    """Parameters by hand, and what removing 20 % and 40 % of the routed atomic experts removes of the whole
    model."""
    deepseek_moe.register()
    config = AutoConfig.for_model(**CONFIG_16B)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    attention, norms, dense = 4 * 2048 * 2048, 2 * 2048, 3 * 2048 * 10944
    routed, shared, router = 64 * 3 * 2048 * 1408, 3 * 2048 * 2 * 1408, 64 * 2048
    by_hand = 2 * 102400 * 2048 + 2048 + 28 * (attention + norms) + dense + 27 * (routed + shared + router)
    assert total == by_hand == 16_375_728_128
    layers = find_moe_layers(model)
    assert [layer.index for layer in layers] == list(range(1, 28))
    atomic_experts = sum(sum(layer.widths) for layer in layers)
    assert atomic_experts == 27 * 64 * 1408
    assert 0.2 * atomic_experts * 3 * 2048 / total == pytest.approx(0.183, abs=5e-4)
    assert 0.4 * atomic_experts * 3 * 2048 / total == pytest.approx(0.365, abs=5e-4)


def test_generation_with_the_cache_equals_generation_without(deepseek: PreTrainedModel) -> None:
    arguments = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    with_cache = deepseek.generate(tiny_ids(3, 6), use_cache=True, **arguments)
    assert with_cache.shape == (3, 18)
    assert torch.equal(with_cache, deepseek.generate(tiny_ids(3, 6), use_cache=False, **arguments))


@torch.no_grad()
def test_a_text_in_two_parts_through_the_cache_has_the_logits_of_the_whole(deepseek: PreTrainedModel) -> None:
    ids_NW = tiny_ids(2, 9)
    first = deepseek(input_ids=ids_NW[:, :5], use_cache=True)
    second = deepseek(input_ids=ids_NW[:, 5:], past_key_values=first.past_key_values)
    expected = deepseek(input_ids=ids_NW, use_cache=False)
    assert expected.past_key_values is None
    torch.testing.assert_close(
        torch.cat([first.logits, second.logits], dim=1), expected.logits, rtol=1e-5, atol=1e-5
    )


@torch.no_grad()
def test_attention_implementations_padding_and_kept_logits_agree(deepseek: PreTrainedModel) -> None:
    ids_NW = tiny_ids(2, 9)
    deepseek.set_attn_implementation("eager")
    assert deepseek.config._attn_implementation == "eager"
    expected = deepseek(input_ids=ids_NW).logits
    deepseek.set_attn_implementation("sdpa")
    assert deepseek.config._attn_implementation == "sdpa"
    torch.testing.assert_close(deepseek(input_ids=ids_NW).logits, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(
        deepseek(input_ids=ids_NW, logits_to_keep=2).logits, deepseek(input_ids=ids_NW).logits[:, -2:]
    )
    padded = F.pad(ids_NW, (3, 0))
    mask = F.pad(torch.ones_like(ids_NW), (3, 0))
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    torch.testing.assert_close(
        deepseek(input_ids=padded, attention_mask=mask, position_ids=positions).logits[:, 3:],
        expected,
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm", "heapr"])
@torch.no_grad()
def test_experts_implementations_can_be_chosen_and_agree(
    deepseek: PreTrainedModel, implementation: str
) -> None:
    deepseek.set_experts_implementation("eager")
    assert deepseek.config._experts_implementation == "eager"
    expected = deepseek(input_ids=tiny_ids(2, 9)).logits
    ALL_EXPERTS_FUNCTIONS.register("heapr", run_experts)
    deepseek.set_experts_implementation(implementation)
    assert deepseek.config._experts_implementation == implementation
    torch.testing.assert_close(deepseek(input_ids=tiny_ids(2, 9)).logits, expected, rtol=1e-5, atol=1e-5)


def test_outputs_for_training_and_inspection(deepseek: PreTrainedModel) -> None:
    ids_NW = tiny_ids(2, 9)
    deepseek.set_attn_implementation("eager")
    outputs = deepseek(
        input_ids=ids_NW,
        labels=ids_NW,
        output_router_logits=True,
        output_hidden_states=True,
        output_attentions=True,
    )
    expected = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), ids_NW[:, 1:].flatten())
    torch.testing.assert_close(outputs.loss, expected)
    assert [logits_TE.shape for logits_TE in outputs.router_logits] == [(18, 4)] * 2
    assert (len(outputs.hidden_states), len(outputs.attentions)) == (4, 3)
    (grad,) = torch.autograd.grad(outputs.loss, deepseek.model.layers[1].mlp.experts.down_proj)
    deepseek.train()
    deepseek.gradient_checkpointing_enable()
    loss = deepseek(input_ids=ids_NW, labels=ids_NW, use_cache=False).loss
    (again,) = torch.autograd.grad(loss, deepseek.model.layers[1].mlp.experts.down_proj)
    torch.testing.assert_close(again, grad)


@pytest.mark.usefixtures("no_questions")
def test_the_folder_is_found_checked_and_loaded_with_its_tokenizer(tmp_path: Path) -> None:
    config, tensors = write_original_folder(tmp_path / "model")
    source = find_model(str(tmp_path / "model"), dtype="float32")
    assert source.widths == {1: [8] * 4, 2: [8] * 4} and source.max_sequence_length == 64
    text = "Two  words, naïve."
    assert source.tokenizer(text).input_ids == byte_tokenizer()(text).input_ids
    assert source.tokenizer.decode(source.tokenizer(text).input_ids) == text
    model = source.load(torch.device("cpu"))
    ids_NW = tiny_ids(1, 5)
    with torch.no_grad():
        logits_WV = model.logits(model.hidden_states(input_ids=ids_NW))[0]
    torch.testing.assert_close(
        logits_WV.double(), slow_logits(tensors, config, ids_NW[0]), rtol=1e-4, atol=1e-4
    )


def test_what_cannot_be_used_is_refused_in_one_line(tmp_path: Path) -> None:
    pickled, sigmoid = tmp_path / "pickled", tmp_path / "sigmoid"
    _, tensors = write_original_folder(pickled)
    torch.save(tensors, pickled / "pytorch_model-00001-of-00001.bin")
    (pickled / "model.safetensors").unlink()
    with pytest.raises(
        ConfigError, match=r"weights in .* are pickled \(\*.bin\), which is not read; convert them"
    ):
        find_model(str(pickled), dtype="float32")
    write_original_folder(sigmoid, scoring_func="sigmoid")
    with pytest.raises(
        ConfigError, match="config.json in .* cannot be used: scoring_func='sigmoid' is not known"
    ):
        find_model(str(sigmoid), dtype="float32")


def test_the_file_works_as_a_custom_model_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deepseek: PreTrainedModel
) -> None:
    """It imports nothing that a user of a checkpoint may lack, and transformers can load its classes from a
    copy."""
    source = Path(deepseek_moe.__file__)
    nodes = list(ast.walk(ast.parse(source.read_text())))
    modules = [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    modules += [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    assert {module.split(".")[0] for module in modules} == {"__future__", "typing", "torch", "transformers"}
    (tmp_path / source.name).write_text(source.read_text())
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "cache"))
    model_class = dynamic_module_utils.get_class_from_dynamic_module(
        "deepseek_moe.DeepseekForCausalLM", str(tmp_path)
    )
    assert model_class is not DeepseekForCausalLM
    copy = model_class(model_class.config_class(**deepseek.config.to_dict())).eval()
    copy.load_state_dict(deepseek.state_dict())
    assert_same_model(copy, deepseek, tiny_ids(1, 6))
