"""Collects what the evaluations of one run found, and concludes from it.

In: one `Evaluation` after another, each of the "dense" model, the "pruned" model or their "comparison".
Out: metrics and protocols as `summary.json` holds them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from heapr.evaluation.efficiency import size_change
from heapr.evaluation.generation import CONTINUATIONS, compare_continuations
from heapr.evaluation.perplexity import WINDOW_LOSSES, perplexity_increases
from heapr.evaluation.zero_shot import average_accuracy
from heapr.types import Evaluation, Metrics, ProtocolRecord

COMPARISON = "comparison"


class Findings:
    """Metrics of a run, by variant: "dense", "pruned" or "comparison".

    Args:
        measurements: names of all measurements of the run.

    Attributes:
        protocols: how each corpus or task was measured on the "dense" and on the "pruned" model.
    """

    def __init__(self, measurements: Sequence[str]) -> None:
        self._measurements = measurements
        self._metrics: dict[str, Metrics] = {"dense": {}, "pruned": {}, COMPARISON: {}}
        self._window_losses: dict[str, dict[str, list[float]]] = {"dense": {}, "pruned": {}}
        self._continuations: dict[str, dict[str, Any]] = {"dense": {}, "pruned": {}}
        self.protocols: dict[str, dict[str, ProtocolRecord]] = {"dense": {}, "pruned": {}}

    def add(self, variant: str, found: Evaluation) -> None:
        """Add the results of one measurement."""
        self._metrics[variant] |= found.metrics
        if variant != COMPARISON:
            self.protocols[variant] |= found.details.get("protocols", {})
            self._window_losses[variant] |= found.details.get(WINDOW_LOSSES, {})
            self._continuations[variant] |= found.details.get(CONTINUATIONS, {})

    def measured(self, variant: str) -> Metrics:
        """Metrics of the "dense" or the "pruned" model so far, with averages over tasks."""
        metrics = self._metrics[variant]
        return metrics | average_accuracy(self._measurements, metrics)

    def conclude(self, dense: Metrics, kept_ratio: float) -> dict[str, Metrics]:
        """All metrics of the run: "dense", "pruned", the change of "size", and the "comparison".

        Args:
            dense: metrics of the dense model.
            kept_ratio: share of the routed atomic experts that are kept.
        """
        pruned = self.measured("pruned")
        removed = {"atomic_experts_removed_ratio": 1 - kept_ratio}
        increases = perplexity_increases(self._window_losses["dense"], self._window_losses["pruned"])
        written = compare_continuations(self._continuations["dense"], self._continuations["pruned"])
        return {
            "dense": dense,
            "pruned": pruned,
            "size": removed | size_change(dense, pruned),
            "comparison": increases | written | self._metrics[COMPARISON],
        }
