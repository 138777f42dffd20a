"""DeepSeekMoE (`model_type: deepseek`, for example DeepSeekMoE-16B) on transformers' building blocks.

In: a folder in the hub's original format; only its config.json and safetensors are read, never its remote
code. Out: after `register()`, the usual config, model and causal language model. This file imports torch and
transformers alone, so that it works as a custom model file beside a checkpoint. Source: Dai et al.,
DeepSeekMoE, arXiv 2401.06066, equations 9 to 11.
Shape letters: N sequences, W positions, T = N*W tokens, D model width, E routed experts, F atomic experts of
an expert, K experts per token, n tokens of one expert, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.integrations import use_experts_implementation
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeMLP
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

MODEL_TYPE = "deepseek"


class DeepseekMoeConfig(PreTrainedConfig):
    """The fields of the original config.json, with the 16B model's values as defaults.

    `rope_theta` and `rope_scaling` are read as well.

    Attributes:
        intermediate_size: width of the MLP in dense layers.
        moe_intermediate_size: atomic experts of a routed expert; the shared MLP is n_shared_experts times as
            wide.
        first_k_dense_replace: number of layers at the start that are all dense.
        moe_layer_freq: a later layer has experts if this divides its index.
        norm_topk_prob: divide the chosen experts' router weights by their sum.

    Raises:
        ValueError: the scoring function is not softmax.
    """

    model_type = MODEL_TYPE
    _auto_class = "AutoConfig"  # has transformers copy this file to what it saves
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012  transformers' convention
    attribute_map = {"num_experts": "n_routed_experts"}  # noqa: RUF012  transformers' convention

    vocab_size: int = 102400
    hidden_size: int = 2048
    intermediate_size: int = 10944
    moe_intermediate_size: int = 1408
    num_hidden_layers: int = 28
    num_attention_heads: int = 16
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    n_routed_experts: int = 64
    n_shared_experts: int = 2
    num_experts_per_tok: int = 6
    first_k_dense_replace: int = 1
    moe_layer_freq: int = 1
    norm_topk_prob: bool = False
    scoring_func: str = "softmax"
    aux_loss_alpha: float = 0.001
    seq_aux: bool = True
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 100000
    eos_token_id: int | list[int] | None = 100001
    tie_word_embeddings: bool = False
    rope_parameters: dict[str, Any] | None = None
    attention_bias: bool = False
    attention_dropout: float = 0.0

    def __post_init__(self, **kwargs: Any) -> None:
        if self.scoring_func != "softmax":
            raise ValueError(
                f"scoring_func='{self.scoring_func}' is not known to this model; only softmax is supported"
            )
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        super().__post_init__(**kwargs)

    def has_experts(self, layer_index: int) -> bool:
        """Whether a decoder layer is an MoE layer; the others are dense."""
        is_behind_dense = layer_index >= self.first_k_dense_replace
        return is_behind_dense and layer_index % self.moe_layer_freq == 0


class DeepseekMoeRouter(nn.Module):
    """Router weights are the K largest values of a softmax over all routed experts.

    The softmax is taken in the logits' dtype, as in the original: in bfloat16, experts tie that would not in
    float32.
    """

    def __init__(self, config: DeepseekMoeConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        # With K = 1 the chosen expert keeps its probability; dividing it by itself would give 1.
        self.renormalise = config.norm_topk_prob and self.top_k > 1
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))

    def forward(self, hidden_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Router logits (T, E), router weights (T, K) and chosen experts (T, K)."""
        logits_TE = F.linear(hidden_TD, self.weight)
        weight_TK, expert_TK = logits_TE.softmax(dim=-1).topk(self.top_k, dim=-1)
        if self.renormalise:
            weight_TK = weight_TK / weight_TK.sum(dim=-1, keepdim=True)
        return logits_TE, weight_TK, expert_TK


@use_experts_implementation
class DeepseekMoeExperts(nn.Module):
    """The routed experts: gate_up_proj (E, 2F, D) holds [W_gate; W_up], down_proj (E, D, F) holds W_down.

    transformers lets users choose a model's experts implementation only if the decorator is applied in the
    model's own file.
    """

    def __init__(self, config: DeepseekMoeConfig) -> None:
        super().__init__()
        self.num_experts = config.n_routed_experts
        model_width, width = config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * width, model_width))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, model_width, width))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """Sum over each token's experts of router weight times the expert's output."""
        total_TD = torch.zeros_like(hidden_TD)
        for expert in expert_TK.unique().tolist():
            token_n, choice_n = torch.where(expert_TK == expert)
            gate_nF, up_nF = F.linear(hidden_TD[token_n], self.gate_up_proj[expert]).chunk(2, dim=-1)
            output_nD = F.linear(self.act_fn(gate_nF) * up_nF, self.down_proj[expert])
            weighted_nD = weight_TK[token_n, choice_n, None] * output_nD
            total_TD.index_add_(0, token_n, weighted_nD.to(total_TD.dtype))
        return total_TD


class DeepseekMoeBlock(nn.Module):
    """Weighted sum of the chosen routed experts, plus one ungated shared MLP for every token."""

    def __init__(self, config: DeepseekMoeConfig) -> None:
        super().__init__()
        self.gate = DeepseekMoeRouter(config)
        self.experts = DeepseekMoeExperts(config)
        self.shared_experts = Qwen2MoeMLP(
            config, intermediate_size=config.n_shared_experts * config.moe_intermediate_size
        )

    def forward(self, hidden_NWD: Tensor) -> Tensor:
        hidden_TD = hidden_NWD.flatten(0, 1)
        _, weight_TK, expert_TK = self.gate(hidden_TD)
        routed: Tensor = self.experts(hidden_TD, expert_TK, weight_TK)
        shared: Tensor = self.shared_experts(hidden_NWD)
        return routed.view_as(hidden_NWD) + shared


class DeepseekMoeDecoderLayer(GradientCheckpointingLayer):
    """Attention, then a dense MLP or an MoE block, each with a norm before it and a residual connection."""

    def __init__(self, config: DeepseekMoeConfig, layer_index: int) -> None:
        super().__init__()
        self.self_attn = LlamaAttention(config, layer_index)
        self.mlp = DeepseekMoeBlock(config) if config.has_experts(layer_index) else Qwen2MoeMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        transformed: Tensor = self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states + transformed


class DeepseekMoePreTrainedModel(PreTrainedModel):
    """What transformers needs to know of the family."""

    config_class = DeepseekMoeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DeepseekMoeDecoderLayer"]  # noqa: RUF012  transformers' convention
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012  transformers' convention
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {  # noqa: RUF012  transformers' convention
        "router_logits": OutputRecorder(DeepseekMoeRouter, index=0),
        "hidden_states": DeepseekMoeDecoderLayer,
        "attentions": LlamaAttention,
    }

    def __init__(self, config: DeepseekMoeConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        # Before weights are read: a custom model file has no other place to register from.
        _register_conversion()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, DeepseekMoeRouter):
            init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, DeepseekMoeExperts):
            init.normal_(module.gate_up_proj, std=self.config.initializer_range)
            init.normal_(module.down_proj, std=self.config.initializer_range)


class DeepseekMoeModel(DeepseekMoePreTrainedModel):
    """Token ids to final hidden states."""

    def __init__(self, config: DeepseekMoeConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            DeepseekMoeDecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(  # noqa: PLR0917  transformers' signature
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        hidden_NWD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            num_seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            positions_W = torch.arange(hidden_NWD.shape[1], device=hidden_NWD.device) + num_seen
            position_ids = positions_W.unsqueeze(0)
        shared = {"position_ids": position_ids, "past_key_values": past_key_values}
        mask = create_causal_mask(
            config=self.config, inputs_embeds=hidden_NWD, attention_mask=attention_mask, **shared
        )
        position_embeddings = self.rotary_emb(hidden_NWD, position_ids)
        for layer in self.layers:
            hidden_NWD = layer(
                hidden_NWD,
                attention_mask=mask,
                position_embeddings=position_embeddings,
                use_cache=use_cache,
                **shared,
                **kwargs,
            )
        return MoeModelOutputWithPast(
            last_hidden_state=self.norm(hidden_NWD), past_key_values=past_key_values
        )


class DeepseekForCausalLM(DeepseekMoePreTrainedModel, GenerationMixin):
    """Token ids to logits (N, W, V) and, given labels, the next-token loss without auxiliary losses."""

    _auto_class = "AutoModelForCausalLM"
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012  transformers' convention

    def __init__(self, config: DeepseekMoeConfig) -> None:
        super().__init__(config)
        self.model = DeepseekMoeModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(  # noqa: PLR0913, PLR0917  transformers' signature
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return MoeCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )


def register() -> None:
    """Make transformers' auto classes serve `model_type: deepseek` from checkpoints in the original format.

    A folder's own remote code is then neither asked for nor run. Calling this again changes nothing.
    """
    AutoConfig.register(MODEL_TYPE, DeepseekMoeConfig, exist_ok=True)
    AutoModel.register(DeepseekMoeConfig, DeepseekMoeModel, exist_ok=True)
    AutoModelForCausalLM.register(DeepseekMoeConfig, DeepseekForCausalLM, exist_ok=True)
    _register_conversion()


def _register_conversion() -> None:
    """Read and write checkpoints with one tensor per expert and matrix, as Qwen2-MoE's have."""
    register_checkpoint_conversion_mapping(
        MODEL_TYPE, get_checkpoint_conversion_mapping("qwen2_moe"), overwrite=True
    )
