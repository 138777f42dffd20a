"""Walking through the layers gives each layer's experts what a whole forward gives them; families: test_families.py."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from heapr.model.experts import use_heapr_experts
from heapr.model.layerwise import ExpertInputs, walk_layers
from heapr.model.moe import MoEModel
from heapr.model.ragged_experts import Experts, run_experts
from heapr.pruning.surgery import remove
from heapr.types import Plan
from tests.tiny import tiny_ids, tiny_qwen3_moe

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
    plan = Plan(layers={index: torch.rand(4, 8, generator=torch.Generator().manual_seed(index)) > 0.5 for index in range(4)})
    remove(changed, plan)
    expected, dense = inputs_of_whole_passes(changed, IDS_NW), inputs_of_whole_passes(model, IDS_NW)
    for (layer, inputs), replacement in zip(walk_layers(model, IDS_NW.split(4)), changed.layers, strict=True):
        torch.testing.assert_close(inputs.hidden_TD, expected[layer.index])
        assert (layer.index == 0) == torch.equal(inputs.hidden_TD, dense[layer.index])
        layer.replace_experts(replacement.experts)


def test_every_decoder_layer_runs_once_and_the_model_is_left_as_it_was(model: MoEModel) -> None:
    logits = model.model(input_ids=IDS_NW, use_cache=False).logits
    ran: list[int] = []
    for index, decoder in enumerate(model.decoder_layers):
        decoder.mlp.register_forward_hook(lambda *_, index=index: ran.append(index))  # behind the experts
    for _ in walk_layers(model, IDS_NW.split(2)):
        pass
    assert ran == [0, 0, 1, 1, 2, 2]  # two batches; of the last layer only the experts' input is needed
    assert torch.equal(model.model(input_ids=IDS_NW, use_cache=False).logits, logits)
    assert not any("forward" in vars(decoder) for decoder in model.decoder_layers)


def test_pairs() -> None:
    inputs = ExpertInputs(torch.zeros(3, 2), torch.tensor([[0, 2], [1, 0], [2, 1]]), torch.tensor([[0.5, 0.25], [0.125, 1.0], [2.0, 4.0]]))
    token_n, p_n = inputs.pairs(1)
    assert token_n.tolist() == [1, 2] and p_n.tolist() == [0.125, 4.0]


def test_infinite_input_names_the_layer(model: MoEModel) -> None:
    with torch.no_grad():
        model.decoder_layers[1].input_layernorm.weight.fill_(torch.inf)
    with pytest.raises(FloatingPointError, match="layer 1's experts is NaN or infinite"):
        list(walk_layers(model, [IDS_NW]))
