"""Where atomic experts were removed, and how that goes with the routing.

In: plan and statistics. Out: the width and the routing frequency of every expert (`details.json`: what a heat map and a
scatter plot read), and how share kept and frequency correlate. Needs no model.
Shape letters: E experts, F atomic experts of an expert.
"""

from __future__ import annotations

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
        layers = [layer_routing(index, material.plan, material.statistics) for index in material.plan.layers]
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


def layer_routing(index: int, plan: Plan, statistics: Statistics) -> dict[str, Any]:
    """One layer: its decoder layer index, and lists over its experts.

    `widths`: atomic experts kept; `kept_ratio`: their share of the expert's; `routing_frequency`: share of the calibration
    tokens that the dense model routes to the expert (over a layer they sum to the experts per token).
    """
    kept_EF = plan.layers[index]
    width_E = kept_EF.sum(dim=1)
    return {
        "layer": index,
        "atomic_experts_of_each": kept_EF.shape[1],
        "layer_kept_ratio": float(kept_EF.double().mean()),
        "widths": width_E.tolist(),
        "kept_ratio": (width_E.double() / kept_EF.shape[1]).tolist(),
        "routing_frequency": (statistics.layers[index].count_E.cpu() / statistics.num_tokens).tolist(),
    }
