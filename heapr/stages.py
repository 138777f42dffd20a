"""What the stages compute, in memory: for the pipeline, which keeps results in files, and for the library's
functions.

In: a model, statistics and scores. Out: the weights that a criterion reads, plans, and lines in the log.
Calibration is `heapr.calibration.collector.collect`, and surgery, repair and form are `ModelProvider`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from heapr.artifacts import SUPER_EXPERTS, Report
from heapr.model.model_shape import ModelShape
from heapr.model.moe import MoEModel
from heapr.pruning.allocation import allocate
from heapr.pruning.allocation_report import report_allocation
from heapr.pruning.budget import Budget, costs_of
from heapr.pruning.super_experts import SuperExpert, describe_super_experts, find_super_experts
from heapr.types import ExpertWeights, Plan, Scores, Statistics

logger = logging.getLogger(__name__)


def layer_weights(model: Callable[[], MoEModel], index: int) -> ExpertWeights:
    """Weights of one layer's experts, for a criterion.

    Args:
        model: returns the model; called only if the criterion asks for weights.
        index: of the decoder layer.
    """
    view = model()
    with view.hold([index]):
        return next(layer.weights() for layer in view.layers if layer.index == index)


@dataclass(frozen=True)
class Planning:
    """What plans are made from, apart from the scores.

    Attributes:
        shape: of the dense model.
        budget: how much of it goes in all rounds.
        statistics: of the dense model.
        super_experts: the dense model's.
        protects_super_experts: whether they lose nothing.
    """

    shape: ModelShape
    budget: Budget
    statistics: Statistics
    super_experts: Sequence[SuperExpert] = ()
    protects_super_experts: bool = False

    def plan(self, scores: Scores, ratio: float, earlier: Plan | None) -> tuple[Plan, Report]:
        """Choose the share with the lowest scores.

        Args:
            scores: of the model that the round before left.
            ratio: share of the dense model that is gone after this round.
            earlier: the plan of the round before; None in the first round.

        Returns:
            the plan for the dense model, and the report of the allocation.
        """
        costs = costs_of(self.budget.unit, self.statistics, self.shape.atomic_expert_parameters)
        widths = earlier.widths if earlier else self.shape.widths
        budget = self.budget.of_round(ratio, widths, self.shape.widths, costs)
        if self.protects_super_experts:
            protected = tuple((each.layer, each.expert) for each in self.super_experts)
            budget = replace(budget, protected_experts=protected)
        plan = allocate(scores, widths, budget, costs)
        report = report_allocation(plan, scores, widths, budget, costs)
        report[SUPER_EXPERTS] = [each._asdict() for each in self.super_experts]
        if self.super_experts and earlier is None:
            report["summary"].append(describe_super_experts(self.super_experts))
        return earlier.then(plan) if earlier else plan, report


def super_experts_of(model: MoEModel, statistics: Statistics) -> tuple[SuperExpert, ...]:
    """The super experts of a dense model."""
    layers = {layer.index: layer for layer in model.layers}

    def down_max_of(index: int) -> Tensor:
        with model.hold([index]):
            return layers[index].down_abs_max()

    return find_super_experts(statistics, down_max_of)


def log_report(report: Report) -> None:
    """Log the lines of a report that are meant to be read."""
    for line in report["summary"]:
        logger.info("%-9s %s", "prune", line)
    for line in report["not_reached"]:
        logger.warning("%-9s %s", "prune", line)
