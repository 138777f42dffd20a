"""What a measurement is: models and results of earlier steps in, metrics out. What each one finds is an
artifact of its own.

A measurement declares what it `needs`. From that follow how often it is built, on which models it is made,
and which steps come before it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol, runtime_checkable

from heapr.model.experts.dispatch import use_comparable_experts
from heapr.model.load import ModelSource
from heapr.model.moe import MoEModel
from heapr.score.criterion import Unit
from heapr.types import Evaluation, Plan, Scores, Statistics, TokenWindows


class Need(Enum):
    """What a measurement looks at."""

    MODEL = "model"  # any one model: measured once on the dense and once on the pruned one
    DENSE = "dense"  # the dense model alone
    DENSE_AND_PRUNED = "dense_and_pruned"  # both, in memory at once
    STATISTICS = "statistics"  # of the dense model on the calibration tokens
    TOKENS = "tokens"  # that were calibrated on
    SCORES = "scores"  # what the criterion said
    PLAN = "plan"  # what was removed
    MACHINE = "machine"  # timings: they are made again on another machine
    CORPUS = "corpus"  # built once for every corpus of `evaluation.corpora`, its argument `corpus`
    TASK = "task"  # built once for each of its entry's `tasks`, its argument `task`


@dataclass(frozen=True)
class Material:
    """What a measurement may look at; each is loaded when it is asked for, and there is only what the
    measurement `needs`.

    Attributes:
        model: gives the model that is measured: dense or pruned for `Need.MODEL`, dense for `Need.DENSE`.
        dense_and_pruned: gives both, which then are in memory at once.
        statistics, scores, plan, tokens: give what `Need` says.
        unit: what the scores' numbers are.
        widths: atomic experts of every expert before pruning, by decoder layer index.
    """

    model: Callable[[], MoEModel]
    dense_and_pruned: Callable[[], tuple[MoEModel, MoEModel]]
    statistics: Callable[[], Statistics]
    scores: Callable[[], Scores]
    plan: Callable[[], Plan]
    tokens: Callable[[], TokenWindows]
    unit: Unit
    widths: Mapping[int, Sequence[int]]


@runtime_checkable
class Measurement(Protocol):
    """Measures a model, compares two, or looks at what the steps before it found."""

    name: str
    needs: frozenset[Need]  # the same for all of a class

    def identity(self) -> dict[str, Any]:
        """Everything that determines the metrics beside what it needs; JSON types only."""
        ...

    def prepare(self, source: ModelSource) -> None:
        """Whatever can fail through a user's mistake; called before any expensive work.

        Raises:
            ConfigError: it cannot be measured as asked.
        """
        ...

    def __call__(self, material: Material) -> Evaluation:
        """Metrics by contract name, and details, of which "protocols" says by corpus or task how they were
        measured."""
        ...


def measure(measurement: Measurement, material: Material) -> Evaluation:
    """What a measurement finds.

    Where the dense and the pruned model are measured one after the other, their experts run by one and the
    same forward: transformers' own ones round differently, in bfloat16 by more than a light pruning changes.
    """
    if Need.MODEL not in measurement.needs:
        return measurement(material)
    with use_comparable_experts(material.model().model):
        return measurement(material)
