"""Where atomic experts were removed, and how that goes with the routing.

In: plan and statistics. Out: the width and the routing frequency of every expert (`details.json`: what a heat
map and a scatter plot read), and how share kept and frequency correlate. Needs no model.
Shape letters: E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from heapr.evaluation.correlation import spearman
from heapr.evaluation.measurement import Material, Need
from heapr.model.load import ModelSource
from heapr.types import Evaluation, Plan, Statistics


class Routing:
    """Widths against routing.

    Metrics: `routing/spearman`, the rank correlation of routing frequency and share kept over all experts of
    all layers (left out where one is constant); `routing/empty_experts`, experts that keep nothing;
    `routing/kept_ratio_lowest` and `routing/kept_ratio_highest`, the share kept by the layers that keep least
    and most.
    """

    name = "routing"
    needs = frozenset({Need.PLAN, Need.STATISTICS})

    def identity(self) -> dict[str, Any]:
        return {"evaluator": self.name}

    def prepare(self, source: ModelSource) -> None:
        """Nothing can go wrong."""

    def __call__(self, material: Material) -> Evaluation:
        plan, statistics = material.plan(), material.statistics()
        layers = [
            layer_routing(index, plan, width_E, statistics) for index, width_E in material.widths.items()
        ]
        kept_ratios = [layer["layer_kept_ratio"] for layer in layers]
        metrics = {
            "routing/empty_experts": int((_of_all_experts("widths", layers) == 0).sum()),
            "routing/kept_ratio_lowest": min(kept_ratios),
            "routing/kept_ratio_highest": max(kept_ratios),
        }
        correlation = spearman(
            _of_all_experts("routing_frequency", layers), _of_all_experts("kept_ratio", layers)
        )
        if correlation is not None:
            metrics["routing/spearman"] = correlation
        return Evaluation(metrics, details={"layers": layers})


def _of_all_experts(name: str, layers: Sequence[Mapping[str, Any]]) -> Tensor:
    """One of `layer_routing`'s lists, float64, over all layers."""
    return torch.tensor([value for layer in layers for value in layer[name]], dtype=torch.float64)


def layer_routing(index: int, plan: Plan, width_E: Sequence[int], statistics: Statistics) -> dict[str, Any]:
    """One layer: its decoder layer index, and lists over its experts.

    `widths_before`, `widths`: atomic experts before and after; `kept_ratio`: the one over the other, 0 for an
    expert that had none; `routing_frequency`: share of the calibration tokens that the unpruned model routes
    to the expert (over a layer they sum to the experts per token).
    """
    kept_E = plan.layers[index].sum(dim=1).tolist()
    return {
        "layer": index,
        "layer_kept_ratio": sum(kept_E) / sum(width_E),
        "widths_before": list(width_E),
        "widths": kept_E,
        "kept_ratio": [kept / max(width, 1) for kept, width in zip(kept_E, width_E, strict=True)],
        "routing_frequency": (statistics.layers[index].count_E.cpu() / statistics.num_tokens).tolist(),
    }
