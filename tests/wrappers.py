"""Tiny seeded wrappers: a language model together with a vision tower and the like."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from heapr.model.auto_class import wrapper_class
from tests.tiny import COMMON, DENSE_THEN_SPARSE, FAMILIES, LATENT

VISION = {  # each tower takes those of these settings that its configuration has
    "hidden_size": 16, "depth": 1, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "num_heads": 2,
    "head_dim": 8, "intermediate_size": 16, "mlp_dim": 16, "image_size": 28, "patch_size": 14, "out_hidden_size": 16, "output_channels": 16,
    "num_position_embeddings": 16, "position_embedding_size": 16, "vision_output_dim": 16, "projector_input_dim": 16,
    "projector_output_dim": 16, "projection_intermediate_size": 16, "deepstack_visual_indexes": [0], "global_attn_indexes": [0],
    "downsample_channels": [16, 16], "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16, "d_model": 16,
    "output_dim": 16, "downsample_hidden_size": 16, "num_mel_bins": 16, "vocab_size": 16, "window_size": 2,
    "text_hidden_size": 16, "adapter_in_dim": 16, "adapter_input_size": 16, "adapter_out_dim": 16, "mlp_layer_types": ["dense"],
}  # fmt: skip


def sections(*lengths: int) -> dict[str, object]:
    """Rotary positions in time, height and width."""
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(lengths)}


TOWERS = {
    "aria": "idefics3_vision",
    "mistral3": "pixtral",
    "mistral_large4": "pixtral",
}  # that could be others
TOKENS = (
    "image",
    "video",
    "audio",
    "vision",
    "boi",
    "eoi",
    "boa",
    "eoa",
)  # of which configurations give numbers
WRAPPERS: dict[str, dict[str, object]] = {  # model type -> what its text part needs beyond the common settings
    "aria": FAMILIES["aria"],
    "deepseek_ocr2": {**DENSE_THEN_SPARSE, "num_key_value_heads": 2},
    "dots3_note": FAMILIES["dots3_note"],
    "ernie4_5_vl_moe": {**DENSE_THEN_SPARSE, "moe_intermediate_size": [8, 4], "rope_parameters": sections(1, 1, 2)},
    "gemma4": FAMILIES["gemma4"],
    "glm4v_moe": {"rope_parameters": sections(1, 1, 0)},
    "glm5_next": {**LATENT, **DENSE_THEN_SPARSE, "qk_rope_head_dim": 0, "head_dim": 0, "linear_head_dim": 8, "linear_num_heads": 2},
    "inkling2": FAMILIES["inkling2"],
    "inkling_mm_model": FAMILIES["inkling"],
    "llama4": FAMILIES["llama4"],
    "minimax_m3_vl": FAMILIES["minimax_m3_vl"],
    "mistral3": {**LATENT, "model_type": "mistral4", "first_k_dense_replace": 1},
    "mistral4": {**LATENT, "first_k_dense_replace": 1},  # no wrapper, but transformers loads it like one
    "mistral_large4": {**LATENT, **DENSE_THEN_SPARSE},
    "qwen3_5_moe": FAMILIES["qwen3_5_moe"],
    "qwen3_omni_moe_thinker": {},
    "qwen3_vl_moe": {},
    "qwen4_exp": FAMILIES["qwen4_exp"],
    "unlimited_ocr": {**DENSE_THEN_SPARSE, "num_key_value_heads": 2},
}  # fmt: skip


def tiny_wrapper(model_type: str, seed: int = 0, **changes: object) -> PreTrainedModel:
    """2 decoder layers as `tests.tiny.tiny_model` makes them, and towers of one layer."""
    torch.manual_seed(seed)
    config = wrapper_config(model_type, **changes)
    model = wrapper_class(type(config))(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("proj_bias"):
                parameter.normal_(std=0.3)
    return model


def wrapper_config(model_type: str, **changes: object) -> PretrainedConfig:
    config_class = CONFIG_MAPPING[model_type]
    if not config_class.sub_configs:
        return config_class(**{**_known(COMMON, config_class), **WRAPPERS[model_type], **changes})
    parts: dict[str, Any] = {}
    for name, part in config_class.sub_configs.items():
        if name == "text_config":
            text = WRAPPERS[model_type]
            text_part = CONFIG_MAPPING[str(text["model_type"])] if "model_type" in text else part
            parts[name] = {**_known(COMMON, text_part), **text, **changes}
        else:
            kind = TOWERS.get(model_type)
            parts[name] = {**_tower(CONFIG_MAPPING[kind]), "model_type": kind} if kind else _tower(part)
    tokens = {name: 250 for name in dir(config_class) if name.startswith(TOKENS) and "token" in name}
    return config_class(**parts, **tokens)


def _tower(config_class: Any) -> dict[str, Any]:
    inner = {name: _tower(part) for name, part in getattr(config_class, "sub_configs", {}).items()}
    return {**_known(VISION, config_class), **inner}


def _known(settings: dict[str, object], config_class: Any) -> dict[str, object]:
    return {name: value for name, value in settings.items() if name in dir(config_class)}
