"""The interface of measurements: models and results of earlier steps in, metrics out.

A measurement declares what it `needs`. This determines how often it is built, on which models it is made, and
which steps run before it. The result of each measurement is an artifact of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol, runtime_checkable

from heapr.model.experts.dispatch import use_comparable_experts
from heapr.model.load import ModelSource
from heapr.model.moe import MoEModel
from heapr.ranks import ONE_PROCESS, Ranks
from heapr.score.criterion import Unit
from heapr.types import Evaluation, Plan, Scores, Statistics, TokenWindows


class Need(Enum):
    """What a measurement needs."""

    MODEL = "model"  # one model; measured once on the dense and once on the pruned model
    DENSE = "dense"  # the dense model only
    DENSE_AND_PRUNED = "dense_and_pruned"  # both models, in memory at once
    STATISTICS = "statistics"  # of the dense model on the calibration tokens
    TOKENS = "tokens"  # the calibration tokens
    SCORES = "scores"  # the criterion's scores
    PLAN = "plan"  # which atomic experts were removed
    MACHINE = "machine"  # timings, which are measured again on another machine
    CORPUS = "corpus"  # an argument `corpus`; built once for each corpus of `evaluation.corpora`
    TASK = "task"  # an argument `task`; built once for each of its entry's `tasks`


@dataclass(frozen=True)
class Material:
    """What a measurement may use. Only what it `needs` is available, loaded on first use.

    Attributes:
        model: returns the model to measure: dense or pruned for `Need.MODEL`, dense for `Need.DENSE`.
        dense_and_pruned: returns both models, which are then in memory at once.
        statistics, scores, plan, tokens: return what `Need` says.
        unit: of the scores.
        widths: atomic experts of every expert before pruning, by decoder layer index.
        ranks: the processes that measure together; what rank 0 returns counts. It alone measures with
            `Need.MACHINE`.
    """

    model: Callable[[], MoEModel]
    dense_and_pruned: Callable[[], tuple[MoEModel, MoEModel]]
    statistics: Callable[[], Statistics]
    scores: Callable[[], Scores]
    plan: Callable[[], Plan]
    tokens: Callable[[], TokenWindows]
    unit: Unit
    widths: Mapping[int, Sequence[int]]
    ranks: Ranks = ONE_PROCESS


@runtime_checkable
class Measurement(Protocol):
    """Measures one model, compares two, or evaluates results of earlier steps.

    Attributes:
        name: unique among the measurements of an experiment.
        needs: the same for all instances of a class.

    A measurement may also have `objectives`: names of the metrics that a run can return to a sweeper.
    """

    name: str
    needs: frozenset[Need]

    def identity(self) -> dict[str, Any]:
        """Everything that determines the metrics besides what it needs. JSON types only."""
        ...

    def prepare(self, source: ModelSource) -> None:
        """Do everything that a user's mistake can break. Called before any expensive work.

        Raises:
            ConfigError: it cannot be measured as asked.
        """
        ...

    def __call__(self, material: Material) -> Evaluation:
        """Return metrics by contract name, and details.

        In the details, "protocols" says for each corpus or task how it was measured.
        """
        ...


def weight_bytes(model: MoEModel) -> int:
    """Bytes of all parameters."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.model.parameters())


def measure(measurement: Measurement, material: Material) -> Evaluation:
    """Run a measurement.

    If the dense and the pruned model are measured one after the other, both use the same forward of the
    experts. Forwards of transformers differ in rounding, in bfloat16 by more than light pruning changes.
    """
    if Need.MODEL not in measurement.needs:
        return measurement(material)
    with use_comparable_experts(material.model().model):
        return measurement(material)
