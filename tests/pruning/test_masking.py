"""Masking for a while: the same function as masking for good, and every bit comes back."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from heapr.model.moe import MoEModel
from heapr.pruning.masking import masked
from heapr.pruning.surgery import mask
from heapr.types import Plan
from tests.same import logits
from tests.tiny import LAYOUTS, tiny_model


@pytest.mark.parametrize("family", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_and_restored(family: str, dtype: torch.dtype, ids_NW: Tensor) -> None:
    causal_lm = tiny_model(family).to(dtype)
    for_good, for_a_while = MoEModel(copy.deepcopy(causal_lm)), MoEModel(causal_lm)
    generator = torch.Generator().manual_seed(1)
    kept = {layer.index: torch.rand(4, 8, generator=generator) > 0.4 for layer in for_good.layers}
    mask(for_good, Plan(layers=kept))
    before = copy.deepcopy(causal_lm.state_dict())
    dense = logits(for_a_while.model, ids_NW)
    with masked(for_a_while, {index: ~kept_EF for index, kept_EF in kept.items()}):
        assert torch.equal(logits(for_a_while.model, ids_NW), logits(for_good.model, ids_NW))
    assert torch.equal(logits(for_a_while.model, ids_NW), dense)
    assert all(torch.equal(tensor, before[name]) for name, tensor in causal_lm.state_dict().items())


def test_restores_after_an_error(model: MoEModel, ids_NW: Tensor) -> None:
    dense = logits(model.model, ids_NW)
    with pytest.raises(ZeroDivisionError), masked(model, {0: torch.ones(4, 8, dtype=torch.bool)}):
        1 / 0  # noqa: B018
    assert torch.equal(logits(model.model, ids_NW), dense)


def test_a_whole_layer_may_go_and_another_may_be_left_out(model: MoEModel, ids_NW: Tensor) -> None:
    dense = logits(model.model, ids_NW)
    with masked(model, {1: torch.ones(4, 8, dtype=torch.bool)}):
        assert (model.layers[1].experts.down_proj == 0).all() and (
            model.layers[0].experts.down_proj != 0
        ).any()
    with masked(model, {0: torch.zeros(4, 8, dtype=torch.bool)}):
        assert torch.equal(logits(model.model, ids_NW), dense)
