"""Where atomic experts were removed, compared with how tokens are routed. Needs no model.

In: plan and statistics. Out: the width and the routing frequency of every expert (in `details.json`, from
which the heat map and the scatter plot are drawn), and the correlation of share kept and frequency.
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
    """Compares the widths of experts with their routing frequencies.

    Metrics:

    - `routing/spearman`: rank correlation of routing frequency and share kept, over all experts of all
      layers. Left out if one of them is constant.
    - `routing/empty_experts`: number of experts that keep nothing.
    - `routing/kept_ratio_lowest`, `routing/kept_ratio_highest`: smallest and largest share kept by a layer.
    """

    name = "routing"
    needs = frozenset({Need.PLAN, Need.STATISTICS})
    objectives = ("routing/spearman", "routing/empty_experts", "routing/kept_ratio_lowest")

    def identity(self) -> dict[str, Any]:
        return {"evaluator": self.name}

    def prepare(self, source: ModelSource) -> None:
        """Nothing to prepare."""

    def __call__(self, material: Material) -> Evaluation:
        plan = material.plan()
        statistics = material.statistics()
        layers = []
        for index, width_E in material.widths.items():
            layers.append(layer_routing(index, plan, width_E, statistics))
        kept_ratios = [layer["layer_kept_ratio"] for layer in layers]
        is_empty = _of_all_experts("widths", layers) == 0
        metrics = {
            "routing/empty_experts": int(is_empty.sum()),
            "routing/kept_ratio_lowest": min(kept_ratios),
            "routing/kept_ratio_highest": max(kept_ratios),
        }
        frequencies = _of_all_experts("routing_frequency", layers)
        correlation = spearman(frequencies, _of_all_experts("kept_ratio", layers))
        if correlation is not None:
            metrics["routing/spearman"] = correlation
        return Evaluation(metrics, details={"layers": layers})


def _of_all_experts(name: str, layers: Sequence[Mapping[str, Any]]) -> Tensor:
    """One of `layer_routing`'s lists, concatenated over all layers, float64."""
    values = [value for layer in layers for value in layer[name]]
    return torch.tensor(values, dtype=torch.float64)


def layer_routing(index: int, plan: Plan, width_E: Sequence[int], statistics: Statistics) -> dict[str, Any]:
    """Return a layer's index, its share kept, and lists over its experts:

    - `widths_before`, `widths`: atomic experts before and after pruning.
    - `kept_ratio`: widths / widths_before, or 0 for an expert that had no atomic experts.
    - `routing_frequency`: share of the calibration tokens that the unpruned model routes to the expert. The
      frequencies of a layer sum to the experts per token.
    """
    kept_E = plan.layers[index].sum(dim=1).tolist()
    frequency_E = statistics.layers[index].count_E.cpu() / statistics.num_tokens
    return {
        "layer": index,
        "layer_kept_ratio": sum(kept_E) / sum(width_E),
        "widths_before": list(width_E),
        "widths": kept_E,
        "kept_ratio": [kept / max(width, 1) for kept, width in zip(kept_E, width_E, strict=True)],
        "routing_frequency": frequency_E.tolist(),
    }
