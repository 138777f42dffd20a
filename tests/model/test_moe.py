"""The view of a model: its layers, its losses, and what it refuses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from heapr.errors import ConfigError
from heapr.model import loss
from heapr.model.experts.dispatch import observe_experts, use_heapr_experts
from heapr.model.experts.loop import split_by_expert
from heapr.model.loss import next_token_loss, summed_loss_backward
from heapr.model.moe import MoEModel
from heapr.pruning.surgery import remove
from heapr.types import Plan
from tests.tiny import tiny_model, tiny_qwen3_moe

SMALL = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_heapr_experts_give_the_logits_of_transformers(
    causal_lm: PreTrainedModel, ids_NW: Tensor, implementation: str
) -> None:
    causal_lm.set_experts_implementation(implementation)
    with torch.no_grad():
        expected = causal_lm(input_ids=ids_NW, use_cache=False).logits
        with use_heapr_experts(causal_lm):
            torch.testing.assert_close(
                causal_lm(input_ids=ids_NW, use_cache=False).logits, expected, rtol=1e-5, atol=1e-5
            )
    assert causal_lm.config._experts_implementation == implementation


def test_observers_see_the_expert_as_the_formula_has_it(model: MoEModel, ids_NW: Tensor) -> None:
    """output = W_down h, and every token is seen by K experts of a layer."""
    layer = model.layers[0]
    seen = []
    with torch.no_grad(), observe_experts(model.model, [(layer.experts, lambda *call: seen.append(call))]):
        model.model(input_ids=ids_NW, use_cache=False)
    ((h_SF, router_weight_S, output_SD, offsets),) = seen  # one call
    assert offsets[0] == 0 and offsets[-1] == len(h_SF) == ids_NW.numel() * 2
    for down_DF, h_nF, output_nD in zip(
        layer.weights().down_EDF, *(split_by_expert(rows, offsets) for rows in (h_SF, output_SD)), strict=True
    ):
        torch.testing.assert_close(output_nD, h_nF @ down_DF.T)
    assert ((router_weight_S > 0) & (router_weight_S <= 1)).all()
    assert "observer" not in vars(layer.experts)


def test_observers_of_ragged_experts_see_zeros_beyond_an_experts_width(
    model: MoEModel, ids_NW: Tensor
) -> None:
    widths_E = torch.tensor([3, 8, 0, 5])
    kept_EF = torch.arange(8) < widths_E.unsqueeze(1)
    dense = model.layers[0].weights()
    remove(model, Plan(layers={layer.index: kept_EF for layer in model.layers}))
    seen = []
    with (
        torch.no_grad(),
        observe_experts(model.model, [(model.layers[0].experts, lambda *call: seen.append(call))]),
    ):
        model.model(input_ids=ids_NW, use_cache=False)
    ((h_SF, _, output_SD, offsets),) = seen
    of_experts = zip(
        widths_E,
        dense.down_EDF,
        split_by_expert(h_SF, offsets),
        split_by_expert(output_SD, offsets),
        strict=True,
    )
    for width, down_DF, h_nF, output_nD in of_experts:
        assert len(h_nF) and (h_nF[:, width:] == 0).all() and (h_nF[:, :width] != 0).any() == (width > 0)
        torch.testing.assert_close(output_nD, h_nF @ down_DF.T)


def test_losses_equal_those_of_whole_logits(
    causal_lm: PreTrainedModel, ids_NW: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "LOGITS_CHUNK", 257 * 10)
    model = MoEModel(causal_lm)
    logits = causal_lm(input_ids=ids_NW, use_cache=False).logits[:, :-1]
    expected = F.cross_entropy(logits.flatten(0, 1), ids_NW[:, 1:].flatten(), reduction="none").view(8, 11)
    torch.testing.assert_close(
        next_token_loss(model, model.hidden_states(input_ids=ids_NW), ids_NW), expected
    )

    leaf = causal_lm.get_input_embeddings()(ids_NW).detach().requires_grad_()
    (expected_grad,) = torch.autograd.grad(
        F.cross_entropy(
            causal_lm(inputs_embeds=leaf).logits[:, :-1].flatten(0, 1),
            ids_NW[:, 1:].flatten(),
            reduction="sum",
        ),
        leaf,
    )
    leaf.grad = None
    total = summed_loss_backward(model, model.hidden_states(inputs_embeds=leaf), ids_NW)
    torch.testing.assert_close(total, expected.sum())
    torch.testing.assert_close(leaf.grad, expected_grad, rtol=1e-4, atol=1e-5)


def test_models_without_experts_and_missing_capabilities_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="LlamaForCausalLM has no MoE layer"):
        MoEModel(LlamaForCausalLM(LlamaConfig(**SMALL)))
    with_norm = tiny_qwen3_moe()
    with_norm.model.layers[1].mlp.experts.has_post_expert_norm = True
    with pytest.raises(
        ConfigError,
        match="Qwen3MoeForCausalLM needs a missing capability: experts with a norm after the down projection",
    ):
        MoEModel(with_norm)


def test_logits_include_what_a_family_does_behind_its_head(ids_NW: Tensor) -> None:
    scaled = tiny_model("granitemoe")
    assert scaled.config.logits_scaling == 4.0
    model = MoEModel(scaled)
    with torch.no_grad():
        expected = scaled(input_ids=ids_NW, use_cache=False).logits.flatten(0, 1)
        torch.testing.assert_close(
            model.logits(model.hidden_states(input_ids=ids_NW).flatten(0, 1)), expected
        )


def test_models_whose_logits_depend_on_more_than_hidden_states_are_refused(
    causal_lm: PreTrainedModel,
) -> None:
    forward = type(causal_lm).forward
    seen_ids = type("SeenIds", (type(causal_lm),), {})

    def shifted(self: PreTrainedModel, input_ids: Tensor | None = None, **inputs: object) -> object:
        output = forward(self, input_ids=input_ids, **inputs)
        output.logits = output.logits + (0.0 if input_ids is None else 5.0)
        return output

    seen_ids.forward = shifted
    causal_lm.__class__ = seen_ids
    with pytest.raises(
        ConfigError, match="missing capability: logits that depend on more than the final hidden states"
    ):
        MoEModel(causal_lm).check_head()
