"""The one factory of tiny seeded models, statistics and texts."""

from __future__ import annotations

import importlib
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from heapr.model import deepseek_moe
from heapr.types import ExpertWeights, LayerStatistics, Statistics

VOCABULARY_SIZE = 257

COMMON = {  # each family takes those of these settings that its configuration has
    "vocab_size": VOCABULARY_SIZE, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 8, "max_position_embeddings": 64, "eos_token_id": 0, "bos_token_id": None, "pad_token_id": 0, "initializer_range": 0.3,
    "num_experts": 4, "n_routed_experts": 4, "num_local_experts": 4, "moe_num_experts": 4,
    "num_experts_per_tok": 2, "moe_topk": 2, "moe_k": 2, "top_k_experts": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "intermediate_size": 24, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 12, "n_shared_experts": 1,
    "num_shared_experts": 1, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
}  # fmt: skip
LATENT = {"num_key_value_heads": 2}  # multi-head latent attention has as many heads for keys as for queries
EXPERT_WIDTH = {"intermediate_size": 8}  # the field that other families use for their dense layers
DENSE_THEN_SPARSE = {"mlp_layer_types": ["dense", "sparse"]}
LINEAR_THEN_FULL = {"layer_types": ["linear_attention", "full_attention"]}
DELTA_NET = {
    **LINEAR_THEN_FULL, "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
FAMILIES: dict[str, dict[str, object]] = {  # transformers' folder of a family -> what it needs beyond the common settings
    "afmoe": {},
    "aria": EXPERT_WIDTH,
    "axk1": LATENT,
    "axk2": LATENT,
    "bailing_hybrid": {**LATENT, **LINEAR_THEN_FULL, **DENSE_THEN_SPARSE, "num_mtp_layers": 0},
    "beam": DENSE_THEN_SPARSE,
    "cohere2_moe": EXPERT_WIDTH,
    "deepseek": {"num_hidden_layers": 3, "n_shared_experts": 2},  # heapr/model/deepseek_moe.py
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "deepseek_v32": LATENT,
    "deepseek_v4": {},
    "dots1": {},
    "dots3_note": {**LATENT, **DENSE_THEN_SPARSE, "layer_types": ["full_attention"] * 2, "shared_experts_intermediate_size": 8},
    "ernie4_5_moe": {},
    "exaone_moe": {},
    "flex_olmo": EXPERT_WIDTH,
    "flint": {"mlp_only_layers": []},
    "gemma4": {
        "enable_moe_block": True, "hidden_size_per_layer_input": 0, "layer_types": ["sliding_attention", "full_attention"],
        "num_kv_shared_layers": 0,
    },
    "glm4_moe": {},
    "glm4_moe_lite": LATENT,
    "glm_moe_dsa": LATENT,
    "gpt_oss": EXPERT_WIDTH,
    "granitemoe": {**EXPERT_WIDTH, "logits_scaling": 4.0},
    "granitemoe_swa": EXPERT_WIDTH,
    "granitemoehybrid": {
        **EXPERT_WIDTH, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 4,
        "layer_types": ["mamba", "attention"], "shared_intermediate_size": 8,
    },
    "granitemoeshared": EXPERT_WIDTH,
    "hunyuan_v1_moe": EXPERT_WIDTH,
    "hy_v3": {},
    "hy_v4": {},
    "inkling": {},
    "inkling2": {},
    "jamba": {
        **EXPERT_WIDTH, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 1, "expert_layer_offset": 0,
        "mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False,
    },
    "kimi_linear": {
        **LATENT, **LINEAR_THEN_FULL, **DENSE_THEN_SPARSE, "linear_head_dim": 8, "linear_num_heads": 2, "q_lora_rank": None,
    },
    "kolibri1": {},
    "laguna": {},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "llama4": {**EXPERT_WIDTH, "interleave_moe_layer_step": 1, "intermediate_size_mlp": 24, "attention_chunk_size": 32},
    "mellum": {},
    "mimo_v2_flash": {},
    "minimax": EXPERT_WIDTH,
    "minimax_m2": EXPERT_WIDTH,
    "minimax_m3_vl": EXPERT_WIDTH,
    "mixtral": EXPERT_WIDTH,
    "nemotron_h": {"mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 4},
    "olmoe": EXPERT_WIDTH,
    "phimoe": EXPERT_WIDTH,
    "qwen2_moe": {},
    "qwen3_5_moe": DELTA_NET,
    "qwen3_moe": {},
    "qwen3_next": DELTA_NET,
    "qwen4_exp": {
        **DELTA_NET, "hc_count": 2, "hc_lowrank": 4, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8,
        "indexer_budget": 16, "indexer_compress_ratio": 2,
    },
    "solar_open": {},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
WINDOW = {"sliding_window": 4}  # shorter than the sequences of the tests
TWICE_DENSE = {"first_k_dense_replace": 2}
# With the other kinds changing half as often, so that each meets each.
DENSE_SPARSE = {"mlp_layer_types": ["dense", "sparse"] * 2}
SLIDING_FULL = {"layer_types": ["sliding_attention"] * 2 + ["full_attention"] * 2, **WINDOW}
LINEAR_FULL = {"layer_types": ["linear_attention"] * 2 + ["full_attention"] * 2}
FULL_SHARED = {"indexer_types": ["full", "full", "shared", "shared"], "index_topk": 3}
DEEP: dict[str, dict[str, object]] = {  # family -> what gives 4 layers or more with every kind of layer, block and sharing at least twice
    "afmoe": {"num_dense_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2, **WINDOW},
    "axk1": DENSE_SPARSE,
    "axk2": {**DENSE_SPARSE, "index_topk": 3},
    "bailing_hybrid": {**LINEAR_FULL, **DENSE_SPARSE},
    "beam": {**SLIDING_FULL, **DENSE_SPARSE},
    "cohere2_moe": {**SLIDING_FULL, **DENSE_SPARSE},
    "deepseek": {"num_hidden_layers": 5, "moe_layer_freq": 2},
    "deepseek_v2": TWICE_DENSE,
    "deepseek_v3": TWICE_DENSE,
    "deepseek_v32": {**DENSE_SPARSE, "index_topk": 3},
    "deepseek_v4": {
        "num_hidden_layers": 6, "mlp_layer_types": ["hash_moe", "moe"] * 3, "index_topk": 2, **WINDOW,
        "layer_types": ["heavily_compressed_attention"] * 2 + ["compressed_sparse_attention"] * 2 + ["sliding_attention"] * 2,
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
    },
    "dots1": {**TWICE_DENSE, "layer_types": ["sliding_attention", "full_attention"] * 2, **WINDOW},
    "dots3_note": {
        **DENSE_SPARSE, **SLIDING_FULL, "index_topk": 3, "swa_num_attention_heads": 2, "swa_num_key_value_heads": 2, "swa_head_dim": 16,
        "swa_q_lora_rank": 8, "swa_kv_lora_rank": 8, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8,
    },
    "ernie4_5_moe": {"moe_layer_interval": 2, "moe_layer_end_index": 3},
    "exaone_moe": {**SLIDING_FULL, **DENSE_SPARSE},
    "flint": {**SLIDING_FULL, "mlp_only_layers": [0, 2]},
    "gemma4": {"layer_types": ["sliding_attention", "full_attention"] * 2, **WINDOW, "hidden_size_per_layer_input": 8,
               "vocab_size_per_layer_input": VOCABULARY_SIZE},
    "glm4_moe": TWICE_DENSE,
    "glm4_moe_lite": DENSE_SPARSE,
    "glm_moe_dsa": {**DENSE_SPARSE, **FULL_SHARED},
    "gpt_oss": {"layer_types": ["sliding_attention", "full_attention"] * 2, **WINDOW},
    "granitemoe_swa": {**SLIDING_FULL, "layer_rope_theta": [10000.0, 0.0] * 2},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "granitemoeshared": {"shared_intermediate_size": 8},
    "hy_v3": DENSE_SPARSE,
    "hy_v4": {**DENSE_SPARSE, **FULL_SHARED},
    "inkling": {"layer_types": ["hybrid_sliding"] * 2 + ["hybrid"] * 2, **DENSE_SPARSE, "sliding_window_size": 4},
    "inkling2": {
        "num_hidden_layers": 6, "layer_types": ["hybrid_sliding", "hybrid", "hybrid"] * 2, "n_layers_per_attn_res_block": 2,
        "sliding_window_size": 4,
    },
    "jamba": {"num_hidden_layers": 6, "expert_layer_period": 3},
    "kimi_linear": {**LINEAR_FULL, **DENSE_SPARSE},
    "kolibri1": SLIDING_FULL,
    "laguna": {**SLIDING_FULL, **DENSE_SPARSE, "num_attention_heads_per_layer": [2] * 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 2},
    "llama4": {"interleave_moe_layer_step": 2, "no_rope_layers": [1, 1, 0, 0], "attention_chunk_size": 4},
    "mellum": {**SLIDING_FULL, **DENSE_SPARSE},
    "mimo_v2_flash": {**SLIDING_FULL, **DENSE_SPARSE},
    "minimax": {**LINEAR_FULL, "block_size": 4},
    "minimax_m3_vl": {
        **DENSE_SPARSE, "layer_types": ["full_attention"] * 2 + ["minimax_m3_sparse"] * 2, "index_block_size": 2, "index_topk_blocks": 2,
        "index_n_heads": 1,
    },
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"] * 2},
    "qwen2_moe": {**SLIDING_FULL, "use_sliding_window": True, "mlp_only_layers": [0, 2]},
    "qwen3_5_moe": LINEAR_FULL,
    "qwen3_moe": {"mlp_only_layers": [0, 2]},
    "qwen3_next": {**LINEAR_FULL, "mlp_only_layers": [0, 2]},
    "qwen4_exp": {
        "num_hidden_layers": 6, "layer_types": ["linear_attention", "linear_attention", "full_attention"] * 2, "ple_layer_ids": [1, 4],
        "ngram_vocab_size_base": 64, "heads_per_ngram": 2,
    },
    "zaya": {"layer_types": ["hybrid_sliding", "hybrid"] * 2, **WINDOW},
}  # fmt: skip
# Family -> what makes its layers hand something on inside their arguments.
SHARED_INSIDE: dict[str, dict[str, object]] = {
    "gemma4": {"num_kv_shared_layers": 2},
}
# A family of each way to store experts.
LAYOUTS = (
    "qwen3_moe",
    "qwen2_moe",
    "deepseek",
    "aria",
    "gpt_oss",
    "llama4",
    "nemotron_h",
)


def model_class_of(family: str) -> type[PreTrainedModel]:
    """The causal language model of a folder of transformers, or our own."""
    if family == deepseek_moe.MODEL_TYPE:
        deepseek_moe.register()
        return deepseek_moe.DeepseekForCausalLM
    folder = Path(transformers.__file__).parent / "models" / family
    for path in sorted(folder.glob("modeling_*.py")):
        module = importlib.import_module(f"transformers.models.{family}.{path.stem}")
        for name in module.__all__:
            if name.endswith("ForCausalLM"):
                return getattr(module, name)
    raise LookupError(family)


def tiny_model(family: str, seed: int = 0, **changes: object) -> PreTrainedModel:
    """2 layers, 4 experts x 8 atomic experts, top-2, weights large enough that every part matters."""
    model_class = model_class_of(family)
    known = model_class.config_class()
    settings = {name: value for name, value in COMMON.items() if name in dir(known)}
    torch.manual_seed(seed)
    model = model_class(model_class.config_class(**{**settings, **FAMILIES[family], **changes})).eval()
    with torch.no_grad():  # transformers starts biases at zero, where none of them matters
        for name, parameter in model.named_parameters():
            if name.endswith("proj_bias"):
                parameter.normal_(std=0.3)
    return model


def deep_model(family: str, **changes: object) -> PreTrainedModel:
    """At least 4 layers, with every kind of layer, block and sharing that the family's configuration knows at
    least twice."""
    return tiny_model(family, **{"num_hidden_layers": 4, **DEEP.get(family, {}), **changes})


def tiny_qwen3_moe(seed: int = 0, **changes: object) -> PreTrainedModel:
    return tiny_model("qwen3_moe", seed, **changes)


def tiny_ids(num_sequences: int, length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY_SIZE, (num_sequences, length), generator=generator)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|endoftext|>": 0} | {symbol: number for number, symbol in enumerate(alphabet, start=1)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )


def no_weights(index: int) -> ExpertWeights:
    """For criteria that must not look at weights."""
    raise AssertionError(f"the weights of layer {index} were asked for")


def write_description(folder: Path, model: PreTrainedModel) -> Path:
    """What describes a model in its folder: configuration, generation settings and tokenizer, without
    weights."""
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def layer_statistics(count: list[float], **values: list[list[float]]) -> LayerStatistics:
    """Statistics of a layer with the given tensors (names without their shape); the others are zero."""
    width = len(next(iter(values.values()))[0]) if values else 1
    zeros = LayerStatistics.zeros(len(count), width, torch.device("cpu"))
    given = {f"{name}_EF": torch.tensor(value, dtype=torch.float64) for name, value in values.items()}
    return LayerStatistics(
        **{**dict(zeros.items()), **given, "count_E": torch.tensor(count, dtype=torch.float64)}
    )


def statistics_of(layers: dict[int, LayerStatistics], num_predicted_tokens: int = 1) -> Statistics:
    return Statistics(
        layers=layers,
        num_tokens=num_predicted_tokens,
        num_predicted_tokens=num_predicted_tokens,
        loss_sum=0.0,
    )
