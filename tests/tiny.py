"""The one factory of tiny seeded models, statistics and texts."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    MixtralForCausalLM,
    OlmoeForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2MoeForCausalLM,
    Qwen3MoeForCausalLM,
)

from heapr.model import deepseek_moe
from heapr.types import ExpertWeights, LayerStatistics, Statistics

VOCABULARY_SIZE = 257


COMMON = {
    "vocab_size": VOCABULARY_SIZE, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 8, "num_experts_per_tok": 2, "max_position_embeddings": 64, "eos_token_id": 0, "bos_token_id": None,
    "pad_token_id": 0, "initializer_range": 0.3,
}  # fmt: skip
FAMILIES = {
    "qwen3_moe": (Qwen3MoeForCausalLM, {"num_experts": 4, "moe_intermediate_size": 8, "intermediate_size": 24}),
    "qwen2_moe": (
        Qwen2MoeForCausalLM,
        {"num_experts": 4, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 12, "intermediate_size": 24},
    ),
    "mixtral": (MixtralForCausalLM, {"num_local_experts": 4, "intermediate_size": 8}),
    "olmoe": (OlmoeForCausalLM, {"num_experts": 4, "intermediate_size": 8}),
    "deepseek": (
        deepseek_moe.DeepseekMoeForCausalLM,
        {
            "n_routed_experts": 4, "n_shared_experts": 2, "moe_intermediate_size": 8, "intermediate_size": 24,
            "num_hidden_layers": 3, "first_k_dense_replace": 1,
        },
    ),
}  # fmt: skip


def tiny_model(family: str, seed: int = 0, **changes: object) -> PreTrainedModel:
    """2 MoE layers x 4 experts x 8 atomic experts, top-2, weights large enough that every part matters."""
    deepseek_moe.register()
    model_class, settings = FAMILIES[family]
    torch.manual_seed(seed)
    return model_class(model_class.config_class(**{**COMMON, **settings, **changes})).eval()


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
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


def no_weights(index: int) -> ExpertWeights:
    """For criteria that must not look at weights."""
    raise AssertionError(f"the weights of layer {index} were asked for")


def layer_statistics(count: list[float], **values: list[list[float]]) -> LayerStatistics:
    """Statistics of a layer with the given tensors (names without their shape); the others are zero."""
    width = len(next(iter(values.values()))[0]) if values else 1
    zeros = LayerStatistics.zeros(len(count), width, torch.device("cpu"))
    given = {f"{name}_EF": torch.tensor(value, dtype=torch.float64) for name, value in values.items()}
    return LayerStatistics(**{**dict(zeros.items()), **given, "count_E": torch.tensor(count, dtype=torch.float64)})


def statistics_of(layers: dict[int, LayerStatistics], num_predicted_tokens: int = 1) -> Statistics:
    return Statistics(layers=layers, num_tokens=num_predicted_tokens, num_predicted_tokens=num_predicted_tokens, loss_sum=0.0)
