"""What is measured on: the shapes of the published models, and toy ones that a CPU runs in a second.

In: shapes and a device. Out: models and experts with seeded random weights in bfloat16, made on the device.
Shape letters: T tokens, D model width, K experts per token, N sequences, W window.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from heapr.model.deepseek_moe import DeepseekForCausalLM, DeepseekMoeConfig, register
from heapr.model.experts.ragged import RaggedExperts

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Shapes:
    """Of Qwen3-30B-A3B's layers, and of the work.

    Attributes:
        deepseek: fields of the configuration that are not DeepSeekMoE-16B's.
        num_sequences, window, batch_size: of a calibration.
        batches_of_layers: of the four layers' calibration.
        prefill, decode, repair_tokens: tokens that one layer gets.
        repeats: turns.
    """

    model_width: int = 2048
    num_experts: int = 128
    experts_per_token: int = 8
    width: int = 768
    num_heads: int = 32
    head_dim: int = 128
    num_layers: int = 4
    vocabulary_size: int = 8192  # the head is not what is measured
    deepseek: tuple[tuple[str, int], ...] = ()
    num_sequences: int = 128
    window: int = 2048
    batch_size: int = 8
    batches_of_layers: int = 4
    prefill: int = 8192
    decode: int = 32
    repair_tokens: int = 32768
    repeats: int = 5


TOY = Shapes(
    model_width=32, num_experts=8, experts_per_token=2, width=128, num_heads=2, head_dim=16, num_layers=2,
    vocabulary_size=64,
    deepseek=(
        ("vocab_size", 64), ("hidden_size", 32), ("intermediate_size", 32), ("moe_intermediate_size", 16),
        ("num_hidden_layers", 3), ("num_attention_heads", 2), ("n_routed_experts", 4),
        ("num_experts_per_tok", 2),
    ),
    num_sequences=4, window=16, batch_size=2, batches_of_layers=2, prefill=64, decode=4, repair_tokens=256,
    repeats=1,
)  # fmt: skip


def layers_model(shapes: Shapes, device: torch.device) -> PreTrainedModel:
    """Some layers of Qwen3-30B-A3B's shape."""
    config = Qwen3MoeConfig(
        vocab_size=shapes.vocabulary_size,
        hidden_size=shapes.model_width,
        num_hidden_layers=shapes.num_layers,
        num_attention_heads=shapes.num_heads,
        num_key_value_heads=max(1, shapes.num_heads // 8),
        head_dim=shapes.head_dim,
        num_experts=shapes.num_experts,
        num_experts_per_tok=shapes.experts_per_token,
        moe_intermediate_size=shapes.width,
        norm_topk_prob=True,
    )
    return _random(Qwen3MoeForCausalLM, config, device)


def deepseek_model(shapes: Shapes, device: torch.device) -> PreTrainedModel:
    """DeepSeekMoE-16B."""
    register()
    return _random(DeepseekForCausalLM, DeepseekMoeConfig(**dict(shapes.deepseek)), device)


def dense_experts(shapes: Shapes, device: torch.device) -> Qwen3MoeExperts:
    """The routed experts of one layer of Qwen3-30B-A3B."""
    config = Qwen3MoeConfig(
        hidden_size=shapes.model_width,
        num_experts=shapes.num_experts,
        moe_intermediate_size=shapes.width,
        num_experts_per_tok=shapes.experts_per_token,
    )
    with torch.device(device):
        experts = Qwen3MoeExperts(config).to(torch.bfloat16)
    return _fill(experts)


def ragged_experts(dense: Qwen3MoeExperts, widths: list[int]) -> RaggedExperts:
    """Random ones of the given widths."""
    return _fill(RaggedExperts(dense, widths))


def routed_tokens(shapes: Shapes, num_tokens: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Random tokens (T, D), the experts of each and their router weights (T, K)."""
    generator = torch.Generator(device).manual_seed(1)
    options = {"device": device, "generator": generator}
    hidden_TD = torch.randn(num_tokens, shapes.model_width, **options)
    chance_TE = torch.rand(num_tokens, shapes.num_experts, **options)
    expert_TK = chance_TE.topk(shapes.experts_per_token, dim=1).indices
    p_TK = torch.rand(num_tokens, shapes.experts_per_token, **options).softmax(dim=1)
    return hidden_TD.bfloat16(), expert_TK, p_TK.bfloat16()


def token_batches(model: PreTrainedModel, shapes: Shapes, num_sequences: int) -> list[Tensor]:
    """Random token ids, (N, W) each."""
    generator = torch.Generator().manual_seed(2)
    size = (num_sequences, shapes.window)
    ids_NW = torch.randint(model.config.vocab_size, size, generator=generator)
    return list(ids_NW.split(shapes.batch_size))


def _random(
    model_class: type[PreTrainedModel], config: PretrainedConfig, device: torch.device
) -> PreTrainedModel:
    with torch.device(device):
        model = model_class._from_config(config, dtype=torch.bfloat16)
    return _fill(model.eval())


@torch.no_grad()
def _fill(module: M) -> M:
    """Seeded weights. Every parameter that is no vector is normal, of standard deviation 0.02."""
    generator: torch.Generator | None = None
    for parameter in module.parameters():
        if generator is None:
            generator = torch.Generator(parameter.device).manual_seed(0)
        if parameter.dim() > 1:
            parameter.normal_(std=0.02, generator=generator)
    return module.requires_grad_(False)
