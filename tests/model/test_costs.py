"""What a pass costs on the meta device against the same pass on the CPU, where torch counts and real tensors
are saved."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, PreTrainedModel

from heapr.model.costs import HeldTensors, activation_bytes, calibration_flops, eager_attention
from heapr.model.experts.dispatch import observe_experts
from heapr.model.loss import frozen_parameters, gradient_from_embeddings, summed_loss_backward
from heapr.model.moe import MoEModel
from heapr.pruning.surgery import remove
from heapr.types import Plan
from tests.tiny import tiny_ids, tiny_model, tiny_qwen3_moe

IDS_NW = tiny_ids(num_sequences=2, length=16)
# Torch's kernels on the CPU are not the fused ones where heads of keys and values differ in width, or where a
# window masks.
BYTES_TOLERANCE = {"deepseek_v2": 0.01, "afmoe": 0.05}
FAMILIES = [
    "qwen3_moe",
    "deepseek",
    "deepseek_v2",
    "afmoe",
    "gpt_oss",
    "llama4",
    "nemotron_h",
    "qwen3_next",
    "jamba",
    "gemma4",
]


def on_meta(model: PreTrainedModel) -> MoEModel:
    with torch.device("meta"):
        return MoEModel(type(model)._from_config(model.config))


def real_flops(model: MoEModel, ids_NW: Tensor) -> int:
    """Forward and backward, counted by torch."""
    with (
        eager_attention(model), frozen_parameters(model.model), gradient_from_embeddings(model.model),
        observe_experts(model.model, []), FlopCounterMode(display=False) as counter,
    ):  # fmt: skip
        summed_loss_backward(model, model.hidden_states(input_ids=ids_NW), ids_NW)
    return counter.get_total_flops()


def real_bytes(model: MoEModel, ids_NW: Tensor) -> int:
    """What autograd saves and the collector keeps while a batch goes forward, and the logits (one chunk at
    this size)."""
    held = HeldTensors(model)
    watched = [(layer.experts, held.observe) for layer in model.layers]
    with (
        frozen_parameters(model.model),
        gradient_from_embeddings(model.model),
        observe_experts(model.model, watched),
        held,
    ):
        hidden_NWD = model.hidden_states(input_ids=ids_NW)
        summed_loss_backward(
            model,
            hidden_NWD.detach().flatten(0, 1).unsqueeze(0).requires_grad_(),
            ids_NW.flatten().unsqueeze(0),
        )
    return held.num_bytes


@pytest.mark.parametrize("family", FAMILIES)
def test_flops_and_bytes_of_a_pass_are_those_of_a_real_one(family: str) -> None:
    real = MoEModel(tiny_model(family))
    meta = on_meta(real.model)
    assert calibration_flops(meta, 16) * 2 == real_flops(real, IDS_NW)
    assert activation_bytes(meta, 2, 16) == pytest.approx(
        real_bytes(real, IDS_NW), rel=BYTES_TOLERANCE.get(family, 0)
    )


def test_a_held_tensor_counts_once_and_parameters_and_their_views_never() -> None:
    model = MoEModel(tiny_qwen3_moe())
    held, values = HeldTensors(model), torch.ones(10, requires_grad=True)
    with held:
        (values[:5] * values[5:]).sum()  # two views of one storage
        model.model.lm_head.weight[0] * 2.0
    assert held.num_bytes == 40


def test_attention_weights_are_not_held() -> None:
    """Twice the length is twice the bytes: nothing of a fused attention is quadratic."""
    model = on_meta(tiny_qwen3_moe(max_position_embeddings=4096, vocab_size=32))
    short, long = activation_bytes(model, 1, 1024), activation_bytes(model, 1, 2048)
    assert long == pytest.approx(2 * short, rel=0.01)


def test_experts_of_individual_widths_are_visited_evenly() -> None:
    real = MoEModel(tiny_qwen3_moe())
    dense = calibration_flops(on_meta(real.model), 16)
    kept_EF = torch.rand(4, 8, generator=torch.Generator().manual_seed(0)) > 0.4
    remove(real, Plan(layers={0: kept_EF, 1: torch.ones(4, 8, dtype=torch.bool)}))
    real.model.to("meta")
    visits = 16 * 2 / 4  # tokens x K / E
    removed = int((~kept_EF).sum())
    # Passes x visits x atomic experts x 2 * 3 * D.
    assert dense - calibration_flops(real, 16) == 2 * visits * removed * 2 * 3 * 16


def test_whatever_was_exchanged_is_put_back() -> None:
    model = on_meta(tiny_model("llama4"))
    chosen = (model.model.get_experts_implementation(), model.model.config._attn_implementation)
    calibration_flops(model, 8)
    activation_bytes(model, 1, 8)
    assert (model.model.get_experts_implementation(), model.model.config._attn_implementation) == chosen
    for layer in model.layers:
        assert not {"forward", "run", "observer"} & set(vars(layer.experts))
    assert all(parameter.requires_grad for parameter in model.model.parameters())


def test_layers_that_read_values_are_told_by_a_runtime_error() -> None:
    model = on_meta(tiny_qwen3_moe())
    model.layers[0].block.register_forward_hook(lambda _, __, output: output * int(output.sum()))
    with pytest.raises(RuntimeError, match="meta"):
        calibration_flops(model, 8)


def test_the_auto_class_gives_the_language_model_of_a_model_of_images_and_text() -> None:
    from transformers import Llama4Config

    config = Llama4Config(text_config=tiny_model("llama4").config.to_dict())
    with torch.device("meta"):
        model = MoEModel(AutoModelForCausalLM.from_config(config))
    assert len(model.layers) == 2 and type(model.model).__name__ == "Llama4ForCausalLM"
