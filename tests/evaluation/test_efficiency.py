"""Counts against torch's own counter and against numbers computed by hand."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from heapr.calibration.collector import collect
from heapr.evaluation.efficiency import Efficiency, size_change
from heapr.model.experts.dispatch import use_heapr_experts
from heapr.model.moe import MoEModel
from heapr.pruning.surgery import mask, remove
from heapr.types import Plan
from tests.evaluation.material import of_model
from tests.tiny import LAYOUTS, layer_statistics, statistics_of, tiny_ids, tiny_model, tiny_qwen3_moe


def counted_by_torch(model: MoEModel, ids_NW: torch.Tensor) -> int:
    model.model.set_experts_implementation("eager")
    model.model.set_attn_implementation("eager")
    # Llama-4's own experts compute every token in every expert
    outside = (
        use_heapr_experts(model.model) if type(model.model).__name__.startswith("Llama4") else nullcontext()
    )
    with torch.no_grad(), outside, FlopCounterMode(display=False) as counter:
        model.model(input_ids=ids_NW, use_cache=False)
    return counter.get_total_flops()


@pytest.mark.parametrize("family", LAYOUTS)
@pytest.mark.parametrize("pruned", [False, True])
def test_flops_equal_torchs_count_on_the_tokens_whose_routing_was_counted(family: str, pruned: bool) -> None:
    """Equal, not close: routing frequencies are those of the very batch (of the pruned model, where it is
    pruned)."""
    model, ids_NW = MoEModel(tiny_model(family)), tiny_ids(3, 12)
    if pruned:
        generator = torch.Generator().manual_seed(1)
        remove(
            model,
            Plan(layers={layer.index: torch.rand(4, 8, generator=generator) > 0.4 for layer in model.layers}),
        )
    metrics = Efficiency(window=12)(of_model(model, collect(model, [ids_NW]))).metrics
    expected = counted_by_torch(model, ids_NW)
    assert round(metrics["flops_per_token"] * 36, 6) == expected
    assert 0 < metrics["flops_per_token_routed"] * 36 < expected


def test_expert_flops_follow_the_routing() -> None:
    model = MoEModel(tiny_qwen3_moe())
    layer = layer_statistics([10, 30, 0, 0], h_sq_sum=[[0.0] * 8] * 4)
    statistics = statistics_of({0: layer, 1: layer}, num_predicted_tokens=20)
    dense = Efficiency(window=8)(of_model(model, statistics)).metrics
    # Layers * experts per token * (2 * 3 * D * F)
    assert dense["flops_per_token_routed"] == 2 * (40 / 20) * 2 * 3 * 16 * 8
    kept_EF = torch.ones(4, 8, dtype=torch.bool)
    kept_EF[1, :4] = False  # half of the expert that three quarters of the tokens visit
    remove(model, Plan(layers={0: kept_EF, 1: kept_EF}))
    pruned = Efficiency(window=8)(of_model(model, statistics)).metrics
    assert pruned["flops_per_token_routed"] == dense["flops_per_token_routed"] * (0.25 + 0.75 / 2)
    change = size_change(dense, pruned)
    assert change["parameters_routed_removed_ratio"] == change["atomic_experts_removed_ratio"] == 4 / 32
    assert change["flops_routed_removed_ratio"] == 0.75 / 2  # three times the share of atomic experts
    others = dense["parameters"] - dense["parameters_routed"]
    assert pruned["parameters_active_per_token"] == others + pruned["flops_per_token_routed"] / 2
    assert (
        dense["flops_per_token"] - pruned["flops_per_token"]
        == dense["flops_per_token_routed"] - pruned["flops_per_token_routed"]
    )


@pytest.mark.parametrize("family", LAYOUTS)
def test_zeros_are_counted_and_nothing_else_changes(family: str) -> None:
    """A masked model holds and computes what the dense one does; 3 of its 64 atomic experts are zeros."""
    dense, masked = (MoEModel(tiny_model(family)) for _ in range(2))
    first = masked.layers[0].index
    kept = {layer.index: torch.ones(4, 8, dtype=torch.bool) for layer in masked.layers}
    kept[first][1, 2:4] = kept[first][3, 7] = False
    mask(masked, Plan(layers=kept))
    statistics = collect(dense, [tiny_ids(1, 8)])
    before, after = (Efficiency(window=8)(of_model(model, statistics)).metrics for model in (dense, masked))
    size = masked.layers[0].atomic_expert_parameters
    assert (before["parameters_zero"], after["parameters_zero"]) == (0, 3 * size)
    assert before["atomic_experts"] - after["atomic_experts"] == 3
    same = before.keys() - {"parameters_zero", "atomic_experts"}
    assert {name: after[name] for name in same} == {name: before[name] for name in same}


def test_counts_of_the_tiny_model() -> None:
    model = MoEModel(tiny_qwen3_moe())
    metrics = Efficiency(window=8)(of_model(model, collect(model, [tiny_ids(1, 8)]))).metrics
    experts = 2 * 4 * 3 * 8 * 16
    attention = 2 * (16 * 16 + 2 * 8 * 16 + 16 * 16 + 2 * 8)  # q, k and v, o, and the norms of q and k
    router_and_norms = 2 * (4 * 16 + 2 * 16) + 16
    embeddings_and_head = 2 * 257 * 16
    assert metrics["parameters"] == experts + attention + router_and_norms + embeddings_and_head
    assert metrics["parameters_routed"] == experts
    # Two of four experts.
    assert metrics["parameters_active_per_token"] == metrics["parameters"] - experts / 2
    assert metrics["bytes"] == 4 * metrics["parameters"]
    assert metrics["atomic_experts"] == 2 * 4 * 8


def test_size_change_is_the_share_removed() -> None:
    dense = {
        "parameters": 10.0,
        "atomic_experts": 4.0,
        "bytes": 20.0,
        "flops_per_token": 8.0,
        "perplexity/x": 3.0,
    }
    pruned = {
        "parameters": 9.0,
        "atomic_experts": 3.0,
        "bytes": 18.0,
        "flops_per_token": 6.0,
        "perplexity/x": 4.0,
    }
    change = size_change(dense, pruned)
    assert change["flops_removed_ratio"] == 0.25 and change["atomic_experts_removed_ratio"] == 0.25
    assert change["parameters_removed_ratio"] == pytest.approx(0.1) and change["parameters"] == 9
    assert size_change({}, {}) == {}
