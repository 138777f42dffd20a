"""Counts against torch's own counter and against numbers computed by hand."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from heapr.calibration.collector import collect
from heapr.evaluation.efficiency import Efficiency, expert_flops_per_token, size_change
from heapr.model.moe import MoEModel
from heapr.pruning.surgery import remove
from heapr.types import Plan
from tests.tiny import layer_statistics, statistics_of, tiny_ids, tiny_qwen3_moe


def counted_by_torch(model: MoEModel, ids_NW: torch.Tensor) -> int:
    model.model.set_experts_implementation("eager")
    model.model.set_attn_implementation("eager")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.model(input_ids=ids_NW, use_cache=False)
    return counter.get_total_flops()


@pytest.mark.parametrize("pruned", [False, True])
def test_flops_equal_torchs_count_on_the_tokens_whose_routing_was_counted(pruned: bool) -> None:
    model = MoEModel(tiny_qwen3_moe())
    ids_NW = tiny_ids(1, 12)
    if pruned:  # only in the last layer, so that routing stays what it was
        kept_EF = torch.rand(4, 8, generator=torch.Generator().manual_seed(0)) > 0.4
        remove(model, Plan(layers={0: torch.ones(4, 8, dtype=torch.bool), 1: kept_EF}))
    statistics = collect(model, [ids_NW])
    metrics = Efficiency(window=12)(model, statistics).metrics
    assert metrics["flops_per_token"] * 12 == pytest.approx(counted_by_torch(model, ids_NW), rel=1e-12)


def test_expert_flops_follow_the_routing() -> None:
    model = MoEModel(tiny_qwen3_moe())
    layer = layer_statistics([10, 30, 0, 0], h_sq_sum=[[0.0] * 8] * 4)
    statistics = statistics_of({0: layer, 1: layer}, num_predicted_tokens=20)
    dense = expert_flops_per_token(model, statistics)
    assert dense == 2 * (40 / 20) * 2 * 3 * 16 * 8  # layers * experts per token * (2 * 3 * D * F)
    kept_EF = torch.ones(4, 8, dtype=torch.bool)
    kept_EF[1, :4] = False  # half of the expert that three quarters of the tokens visit
    remove(model, Plan(layers={0: kept_EF, 1: kept_EF}))
    assert expert_flops_per_token(model, statistics) == dense * (0.25 + 0.75 / 2)


def test_counts_of_the_tiny_model() -> None:
    model = MoEModel(tiny_qwen3_moe())
    metrics = Efficiency(window=8)(model, collect(model, [tiny_ids(1, 8)])).metrics
    experts = 2 * 4 * 3 * 8 * 16
    attention = 2 * (16 * 16 + 2 * 8 * 16 + 16 * 16 + 2 * 8)  # q, k and v, o, and the norms of q and k
    router_and_norms = 2 * (4 * 16 + 2 * 16) + 16
    embeddings_and_head = 2 * 257 * 16
    assert metrics["parameters"] == experts + attention + router_and_norms + embeddings_and_head
    assert metrics["bytes"] == 4 * metrics["parameters"]
    assert metrics["atomic_experts"] == 2 * 4 * 8


def test_size_change_is_the_share_removed() -> None:
    dense = {"parameters": 10.0, "atomic_experts": 4.0, "bytes": 20.0, "flops_per_token": 8.0, "perplexity/x": 3.0}
    pruned = {"parameters": 9.0, "atomic_experts": 3.0, "bytes": 18.0, "flops_per_token": 6.0, "perplexity/x": 4.0}
    change = size_change(dense, pruned)
    assert change["flops_removed_ratio"] == 0.25 and change["atomic_experts_removed_ratio"] == 0.25
    assert change["parameters_removed_ratio"] == pytest.approx(0.1) and change["parameters"] == 9
    assert size_change({}, {}) == {}
