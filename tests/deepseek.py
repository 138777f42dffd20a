"""DeepSeekMoE folders in the hub's original format, written by hand: old-style config.json, one tensor per
expert and matrix."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.tiny import VOCABULARY_SIZE, byte_tokenizer

CONFIG_16B = {
    "architectures": ["DeepseekForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekConfig",
        "AutoModel": "modeling_deepseek.DeepseekModel",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM",
    },
    "attention_bias": False, "attention_dropout": 0.0, "aux_loss_alpha": 0.001, "bos_token_id": 100000, "eos_token_id": 100001,
    "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 10944,
    "max_position_embeddings": 4096, "model_type": "deepseek", "moe_intermediate_size": 1408, "moe_layer_freq": 1,
    "n_routed_experts": 64, "n_shared_experts": 2, "norm_topk_prob": False, "num_attention_heads": 16, "num_experts_per_tok": 6,
    "num_hidden_layers": 28, "num_key_value_heads": 16, "pretraining_tp": 1, "rms_norm_eps": 1e-6, "rope_scaling": None,
    "rope_theta": 10000, "scoring_func": "softmax", "seq_aux": True, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.36.0", "use_cache": True, "vocab_size": 102400,
}  # fmt: skip
TINY = {
    "vocab_size": VOCABULARY_SIZE, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 2,
    "intermediate_size": 24, "moe_intermediate_size": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "rope_theta": 500.0,
    "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0, "torch_dtype": "float32",
}  # fmt: skip
POISON = "raise RuntimeError('remote code was run')\n"


def original_tensors(config: dict) -> dict[str, Tensor]:
    """Seeded weights under the original names."""
    width, heads, vocabulary = config["hidden_size"], config["num_attention_heads"], config["vocab_size"]
    key_width = width // heads * config["num_key_value_heads"]
    shapes = {
        "model.embed_tokens.weight": (vocabulary, width),
        "model.norm.weight": (width,),
        "lm_head.weight": (vocabulary, width),
    }

    def add_mlp(name: str, intermediate: int) -> None:
        shapes.update({f"{name}.{matrix}_proj.weight": (intermediate, width) for matrix in ("gate", "up")})
        shapes[f"{name}.down_proj.weight"] = (width, intermediate)

    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        shapes.update({f"{layer}.{norm}_layernorm.weight": (width,) for norm in ("input", "post_attention")})
        shapes.update({f"{layer}.self_attn.{matrix}_proj.weight": (width, width) for matrix in ("q", "o")})
        shapes.update(
            {f"{layer}.self_attn.{matrix}_proj.weight": (key_width, width) for matrix in ("k", "v")}
        )
        if index < config["first_k_dense_replace"] or index % config["moe_layer_freq"] != 0:
            add_mlp(f"{layer}.mlp", config["intermediate_size"])
            continue
        shapes[f"{layer}.mlp.gate.weight"] = (config["n_routed_experts"], width)
        add_mlp(f"{layer}.mlp.shared_experts", config["n_shared_experts"] * config["moe_intermediate_size"])
        for expert in range(config["n_routed_experts"]):
            add_mlp(f"{layer}.mlp.experts.{expert}", config["moe_intermediate_size"])
    generator = torch.Generator().manual_seed(0)
    return {
        name: 0.3 * torch.randn(shape, generator=generator) + (len(shape) == 1)
        for name, shape in shapes.items()
    }


def write_original_folder(folder: Path, **changes: object) -> tuple[dict, dict[str, Tensor]]:
    """Configuration, weights, tokenizer, and remote code that must not run. Returns configuration and
    weights."""
    folder.mkdir(parents=True)
    byte_tokenizer().save_pretrained(folder)
    described = folder / "tokenizer_config.json"
    described.write_text(
        json.dumps({**json.loads(described.read_text()), "tokenizer_class": "LlamaTokenizerFast"})
    )
    config = {**CONFIG_16B, **TINY, **changes}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("configuration_deepseek.py", "modeling_deepseek.py"):
        (folder / name).write_text(POISON)
    tensors = original_tensors(config)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return config, tensors
