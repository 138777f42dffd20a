"""Surgery: the pruned model is the masked model, only smaller; and it still works as a language model."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from heapr.calibration.collector import collect
from heapr.model.moe import MoEModel
from heapr.pruning.allocation import allocate
from heapr.pruning.budget import Budget
from heapr.pruning.surgery import mask, remove
from heapr.score.data_free import Random
from heapr.score.gradient import Heapr
from heapr.types import Plan
from tests.same import logits
from tests.tiny import LAYOUTS, layer_statistics, no_weights, statistics_of, tiny_model


def random_plan(ratio: float, indices: Sequence[int] = (0, 1)) -> Plan:
    layer = layer_statistics([1] * 4, h_sq_sum=[[1.0] * 8] * 4)
    scores = Random(seed=1)(statistics_of(dict.fromkeys(indices, layer)), no_weights)
    return allocate(
        scores,
        {index: [8] * 4 for index in indices},
        Budget(ratio=ratio, scope="global", experts_per_token=2),
    )


@pytest.mark.parametrize("family", LAYOUTS)
@pytest.mark.parametrize("ratio", [0.1, 0.9])
def test_pruned_equals_masked(family: str, ids_NW: Tensor, ratio: float) -> None:
    causal_lm = tiny_model(family)
    masked, pruned = MoEModel(causal_lm), MoEModel(copy.deepcopy(causal_lm))
    plan = random_plan(ratio, indices=[layer.index for layer in masked.layers])
    dense = logits(masked.model, ids_NW)
    mask(masked, plan)
    remove(pruned, plan)
    torch.testing.assert_close(
        logits(pruned.model, ids_NW), logits(masked.model, ids_NW), rtol=1e-5, atol=1e-5
    )
    assert (logits(pruned.model, ids_NW) - dense).abs().max() > 1e-2  # pruning did something
    assert sum(sum(layer.widths) for layer in pruned.layers) == plan.num_kept


def test_rows_and_columns_are_really_gone(causal_lm: PreTrainedModel) -> None:
    before = sum(p.numel() for p in causal_lm.parameters())
    plan = random_plan(0.5)
    remove(MoEModel(causal_lm), plan)
    assert before - sum(p.numel() for p in causal_lm.parameters()) == (64 - plan.num_kept) * 3 * 16


def test_an_expert_that_loses_everything_contributes_nothing(
    causal_lm: PreTrainedModel, ids_NW: Tensor
) -> None:
    kept_EF = torch.ones(4, 8, dtype=torch.bool)
    kept_EF[2] = False
    plan = Plan(layers={0: kept_EF, 1: torch.ones(4, 8, dtype=torch.bool)})
    masked, pruned = MoEModel(causal_lm), MoEModel(copy.deepcopy(causal_lm))
    mask(masked, plan)
    remove(pruned, plan)
    assert pruned.layers[0].widths == [8, 8, 0, 8]
    torch.testing.assert_close(
        logits(pruned.model, ids_NW), logits(masked.model, ids_NW), rtol=1e-5, atol=1e-5
    )


def test_ratio_zero_is_the_dense_model_exactly(model: MoEModel, ids_NW: Tensor) -> None:
    dense = logits(model.model, ids_NW)
    remove(model, random_plan(0.0))
    assert torch.equal(logits(model.model, ids_NW), dense)


def test_generation_with_the_cache_equals_generation_without(model: MoEModel, ids_NW: Tensor) -> None:
    remove(model, random_plan(0.5))
    arguments = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    with_cache = model.model.generate(ids_NW[:2], use_cache=True, **arguments)
    assert with_cache.shape == (2, 20)
    assert torch.equal(with_cache, model.model.generate(ids_NW[:2], use_cache=False, **arguments))


def test_statistics_of_a_pruned_model_are_those_of_its_kept_atomic_experts(
    causal_lm: PreTrainedModel, ids_NW: Tensor
) -> None:
    """A pruned model can be calibrated again; beside the masked one its kept atomic experts have the same
    scores."""
    plan = random_plan(0.4)
    masked, pruned = MoEModel(causal_lm), MoEModel(copy.deepcopy(causal_lm))
    mask(masked, plan)
    remove(pruned, plan)
    expected, got = (Heapr()(collect(model, [ids_NW]), no_weights) for model in (masked, pruned))
    for index, kept_EF in plan.layers.items():
        for expert, kept_F in enumerate(kept_EF):
            ours = got.layers[index][expert, : kept_F.sum()]
            torch.testing.assert_close(ours, expected.layers[index][expert, kept_F], rtol=1e-4, atol=1e-7)


def test_a_pruned_model_can_be_pruned_again(causal_lm: PreTrainedModel, ids_NW: Tensor) -> None:
    """Two steps equal one step that removes the same atomic experts, removed or masked."""
    model, once, masked = (
        MoEModel(causal_lm),
        MoEModel(copy.deepcopy(causal_lm)),
        MoEModel(copy.deepcopy(causal_lm)),
    )
    first = random_plan(0.3)
    remove(model, first)
    remove(masked, first)
    widths = {layer.index: layer.widths for layer in model.layers}
    second = allocate(
        Heapr()(collect(model, [ids_NW]), no_weights),
        widths,
        Budget(ratio=0.4, scope="global", experts_per_token=2),
    )
    assert second.num_kept == first.num_kept - int(0.4 * first.num_kept + 0.5)
    both = {}
    for index, kept_EF in first.layers.items():
        both[index] = torch.zeros_like(kept_EF)
        for expert, kept_F in enumerate(kept_EF):
            both[index][expert, kept_F.nonzero().flatten()] = second.layers[index][
                expert, : int(kept_F.sum())
            ]
    remove(model, second)
    mask(masked, second)
    remove(once, Plan(layers=both))
    assert torch.equal(logits(model.model, ids_NW), logits(once.model, ids_NW))
    torch.testing.assert_close(logits(masked.model, ids_NW), logits(once.model, ids_NW), rtol=1e-5, atol=1e-5)


def test_weights_of_ragged_experts_are_those_of_the_kept_atomic_experts(causal_lm: PreTrainedModel) -> None:
    dense, plan = MoEModel(copy.deepcopy(causal_lm)), random_plan(0.4)
    model = MoEModel(causal_lm)
    remove(model, plan)
    for before, after in zip(dense.layers, model.layers, strict=True):
        for expert, kept_F in enumerate(plan.layers[before.index]):
            width = int(kept_F.sum())
            assert torch.equal(
                after.weights().gate_EFD[expert, :width], before.weights().gate_EFD[expert, kept_F]
            )
            assert torch.equal(
                after.weights().up_EFD[expert, :width], before.weights().up_EFD[expert, kept_F]
            )
            assert torch.equal(
                after.weights().down_EDF[expert, :, :width], before.weights().down_EDF[expert][:, kept_F]
            )
            assert not after.weights().up_EFD[expert, width:].any()


@pytest.mark.parametrize("family", LAYOUTS)
def test_masking_zeroes_all_slices_of_what_is_removed_and_nothing_else(family: str) -> None:
    """Rows of the input projection, their biases, and columns of W_down; the bias of W_down is the expert's
    own."""
    model = MoEModel(tiny_model(family))
    plan = random_plan(0.4, indices=[layer.index for layer in model.layers])
    mask(model, plan)
    for layer in model.layers:
        removed = int((~plan.layers[layer.index]).sum())
        rows = 2 if hasattr(layer.experts, "gate_up_proj") else 1
        zeros = {name: int((parameter == 0).sum()) for name, parameter in layer.experts.named_parameters()}
        expected = {
            "gate_up_proj": rows * 16,
            "up_proj": rows * 16,
            "down_proj": 16,
            "gate_up_proj_bias": rows,
            "down_proj_bias": 0,
        }
        assert zeros == {name: expected[name] * removed for name in zeros}
