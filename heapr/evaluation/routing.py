"""Where atomic experts were removed, and how that goes with the routing.

In: plan and statistics. Out: the width and the routing frequency of every expert (`details.json`: what a heat map and a
scatter plot read), and how share kept and frequency correlate. Needs no model.
Shape letters: E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from heapr.evaluation.correlation import spearman
from heapr.evaluation.evaluator import Material
from heapr.model.load import ModelSource
from heapr.types import Evaluation, Plan, Statistics


class Routing:
    """Widths against routing.

    Metrics: `routing/spearman`, the rank correlation of routing frequency and share kept over all experts of all layers
    (left out where one is constant); `routing/empty_experts`, experts that keep nothing; `routing/kept_ratio_lowest` and
    `routing/kept_ratio_highest`, the share kept by the layers that keep least and most.
    """

    name = "routing"
    upstream = "prune"

    def identity(self) -> dict[str, Any]:
        return {"evaluator": self.name}

    def prepare(self, source: ModelSource) -> None:
        """Nothing can go wrong."""

    def __call__(self, material: Material) -> Evaluation:
        assert material.plan is not None
        layers = [layer_routing(index, material.plan, width_E, material.statistics) for index, width_E in material.widths.items()]
        widths = torch.tensor([width for layer in layers for width in layer["widths"]])
        kept = torch.tensor([ratio for layer in layers for ratio in layer["kept_ratio"]], dtype=torch.float64)
        frequency = torch.tensor([share for layer in layers for share in layer["routing_frequency"]], dtype=torch.float64)
        metrics = {
            "routing/empty_experts": int((widths == 0).sum()),
            "routing/kept_ratio_lowest": min(layer["layer_kept_ratio"] for layer in layers),
            "routing/kept_ratio_highest": max(layer["layer_kept_ratio"] for layer in layers),
        }
        correlation = spearman(frequency, kept)
        if correlation is not None:
            metrics["routing/spearman"] = correlation
        return Evaluation(metrics, details={"layers": layers})


def layer_routing(index: int, plan: Plan, width_E: Sequence[int], statistics: Statistics) -> dict[str, Any]:
    """One layer: its decoder layer index, and lists over its experts.

    `widths_before`, `widths`: atomic experts before and after; `kept_ratio`: the one over the other, 0 for an expert that had
    none; `routing_frequency`: share of the calibration tokens that the unpruned model routes to the expert (over a layer they
    sum to the experts per token).
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
