"""Walking through the layers gives each layer's experts what a whole forward gives them; families:
test_families.py."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from heapr.errors import ConfigError
from heapr.model.expert_inputs import ExpertInputs
from heapr.model.experts.dispatch import use_heapr_experts
from heapr.model.experts.layout import Experts
from heapr.model.experts.loop import run_experts
from heapr.model.layerwise import walk_layers
from heapr.model.moe import MoEModel
from heapr.model.stream import check_stream
from heapr.pruning.activations import layer_output
from heapr.pruning.surgery import remove
from heapr.types import Plan
from tests.oracle import streams_behind
from tests.tiny import tiny_ids, tiny_model, tiny_qwen3_moe

IDS_NW = tiny_ids(num_sequences=4, length=10)


@pytest.fixture
def model() -> MoEModel:
    return MoEModel(tiny_qwen3_moe(num_hidden_layers=4))


def inputs_of_whole_passes(model: MoEModel, ids_NW: Tensor) -> dict[int, Tensor]:
    """Expert inputs by decoder layer index, from plain forward passes."""
    seen: dict[int, Tensor] = {}

    def run(experts: Experts, hidden_TD: Tensor, *routing: Tensor) -> Tensor:
        seen[next(layer.index for layer in model.layers if layer.experts is experts)] = hidden_TD
        return run_experts(experts, hidden_TD, *routing)

    with torch.no_grad(), use_heapr_experts(model.model, run):
        model.body(input_ids=ids_NW, use_cache=False)
    return seen


def test_changes_are_seen_by_later_layers(model: MoEModel) -> None:
    changed = MoEModel(copy.deepcopy(model.model))
    plan = Plan(
        layers={
            index: torch.rand(4, 8, generator=torch.Generator().manual_seed(index)) > 0.5
            for index in range(4)
        }
    )
    remove(changed, plan)
    expected, dense = inputs_of_whole_passes(changed, IDS_NW), inputs_of_whole_passes(model, IDS_NW)
    for (layer, inputs, _), replacement in zip(
        walk_layers(model, IDS_NW.split(4)), changed.layers, strict=True
    ):
        torch.testing.assert_close(inputs.hidden_TD, expected[layer.index])
        assert (layer.index == 0) == torch.equal(inputs.hidden_TD, dense[layer.index])
        layer.replace_experts(replacement.experts)


def streams(model: MoEModel) -> list[Tensor]:
    return streams_behind(model.body, model.decoder_layers, IDS_NW)


# Plain; behind a dense layer, shared experts; biases of W_down.
@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek", "gpt_oss"])
def test_stream_is_followed(family: str) -> None:
    """What the experts have to put out brings the stream behind their layer to where it was, whatever became
    of earlier layers."""
    walked = MoEModel(tiny_model(family, num_hidden_layers=4))
    expected = streams(walked)
    pruned = MoEModel(copy.deepcopy(walked.model))
    remove(pruned, Plan(layers={layer.index: torch.arange(8).repeat(4, 1) < 3 for layer in walked.layers}))
    for (layer, _, target), replacement in zip(
        walk_layers(walked, IDS_NW.split(3), follow_stream=True), pruned.layers, strict=True
    ):
        without = MoEModel(copy.deepcopy(walked.model))  # cut in earlier layers already
        next(other for other in without.layers if other.index == layer.index).experts.down_proj.zero_()
        assert target is not None
        torch.testing.assert_close(
            target.output_TD, expected[layer.index] - streams(without)[layer.index], rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(target.weight_T, 1 / expected[layer.index].square().mean(1).sqrt())
        layer.replace_experts(replacement.experts)
    assert (streams(walked)[-1] - expected[-1]).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_does_not_pass_for_a_stream_that_is_not_a_sum(dtype: torch.dtype) -> None:
    """A number a thousand times the others' size comes in and is taken out again by the shared expert."""
    model = MoEModel(tiny_model("qwen2_moe").to(dtype))
    layer, large_D = model.decoder_layers[0], 1000 * (torch.arange(16) == 3)
    layer.mlp.experts.down_proj[:, 3] *= 30  # what the experts put out there is lost in bfloat16
    model.model.get_input_embeddings().register_forward_hook(lambda _, __, output: output + large_D)
    layer.mlp.shared_expert_gate.register_forward_hook(lambda _, __, output: torch.full_like(output, 100))
    layer.mlp.shared_expert.register_forward_hook(lambda _, __, output: output - large_D)
    check_stream(model)
    layer.mlp.register_forward_hook(lambda _, __, output: output.tanh())
    with pytest.raises(
        ConfigError, match="layer 0 of Qwen2MoeForCausalLM does not just add its experts' output"
    ):
        check_stream(model)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scaled_experts_put_out_as_much_more(dtype: torch.dtype) -> None:
    """Granite adds 0.22 times what its experts put out."""
    model = MoEModel(tiny_model("granitemoe", residual_multiplier=0.22).to(dtype))
    for layer, inputs, target in walk_layers(model, IDS_NW.split(3), follow_stream=True):
        output_TD = layer_output(layer.experts, inputs)
        assert (
            target is not None
            and (target.output_TD - output_TD).norm()
            < (1e-4 if dtype == torch.float32 else 0.1) * output_TD.norm()
        )


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("llama4", "weighs its experts' inputs"),
        ("hy_v4", "several residual streams"),
        ("gemma4", "does not just add its experts' "),
    ],
)
def test_why_a_stream_cannot_be_followed(family: str, why: str) -> None:
    with pytest.raises(
        ConfigError,
        match=(
            f"pruning.repair.target=residual_stream: layer . of .* {why}.*; give"
            " pruning.repair.target=layer_output"
        ),
    ):
        check_stream(MoEModel(tiny_model(family)))


def test_weights_that_are_not_numbers_are_left_to_calibration(model: MoEModel) -> None:
    with torch.no_grad():
        model.layers[0].experts.down_proj[:] = torch.nan
    check_stream(model)


def test_every_decoder_layer_runs_once_and_the_model_is_left_as_it_was(model: MoEModel) -> None:
    logits = model.model(input_ids=IDS_NW, use_cache=False).logits
    ran: list[tuple[int, int]] = []  # decoder layer, tokens
    for index, decoder in enumerate(model.decoder_layers):  # behind the experts
        decoder.mlp.register_forward_hook(
            lambda _, __, output, index=index: ran.append((index, output.shape[:2].numel()))
        )
    few = [(0, 8), (1, 8), (2, 8), (3, 8)]  # to see which layers read what earlier ones put out
    for _ in walk_layers(model, IDS_NW.split(2)):
        pass
    # Of the last layer only the experts' inputs are needed.
    assert ran == [
        *few,
        (0, 20),
        (0, 20),
        (1, 20),
        (1, 20),
        (2, 20),
        (2, 20),
    ]
    assert torch.equal(model.model(input_ids=IDS_NW, use_cache=False).logits, logits)
    assert not any("forward" in vars(decoder) for decoder in model.decoder_layers)
    ran.clear()
    for _ in walk_layers(model, IDS_NW.split(2), follow_stream=True):
        pass
    # few: without and with experts; both batches: without experts, in the model as it was, on the way to
    # the next layer
    assert [(ran.count((index, 8)), ran.count((index, 20))) for index in range(4)] == [
        (2, 6),
        (2, 6),
        (2, 6),
        (2, 4),
    ]
    assert not any(decoder._forward_hooks or decoder._forward_pre_hooks for decoder in model.decoder_layers)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("zaya", {"num_hidden_layers": 4}),  # a layer hands the router's states to the next one
        # Its tokens.
        (
            "glm_moe_dsa",
            {"num_hidden_layers": 4, "index_topk": 3, "indexer_types": ["full", "full", "shared", "shared"]},
        ),
    ],
)
def test_what_layers_hand_on_beside_hidden_states_stays_with_its_batch(
    family: str, changes: dict[str, object]
) -> None:
    model = MoEModel(tiny_model(family, **changes))
    whole, parts = ([*walk_layers(model, IDS_NW.split(size), follow_stream=True)] for size in (4, 3))
    assert len(whole) >= 3
    for (_, inputs, target), (_, inputs_of_parts, target_of_parts) in zip(whole, parts, strict=True):
        torch.testing.assert_close(inputs_of_parts.hidden_TD, inputs.hidden_TD, rtol=1e-4, atol=1e-5)
        assert torch.equal(inputs_of_parts.expert_TK, inputs.expert_TK)
        torch.testing.assert_close(vars(target_of_parts), vars(target), rtol=1e-4, atol=1e-4)


def test_pairs() -> None:
    inputs = ExpertInputs(
        torch.zeros(3, 2),
        torch.tensor([[0, 2], [1, 0], [2, 1]]),
        torch.tensor([[0.5, 0.25], [0.125, 1.0], [2.0, 4.0]]),
    )
    token_n, p_n = inputs.pairs(4)[1]
    assert token_n.tolist() == [1, 2] and p_n.tolist() == [0.125, 4.0]


def test_infinite_input_names_the_layer(model: MoEModel) -> None:
    with torch.no_grad():
        model.decoder_layers[1].input_layernorm.weight.fill_(torch.inf)
    for follow_stream in (False, True):
        with pytest.raises(FloatingPointError, match="layer 1's experts is NaN or infinite"):
            list(walk_layers(model, [IDS_NW], follow_stream=follow_stream))
