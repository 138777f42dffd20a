"""What an evaluator is: models in, metrics out. Each one's result is an artifact of its own.

An `Evaluator` measures one model and is called on the dense and on the pruned one, always through `measure`; a `Comparison`
looks at both, or at what the stages found. Those with a `corpus` argument are built once for every corpus of
`evaluation.corpora`, those with a `task` argument once for each of their `tasks`; one with a `device` argument is told where
the models are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from transformers import PreTrainedTokenizerBase

from heapr.model.experts.dispatch import use_comparable_experts
from heapr.model.load import ModelSource
from heapr.model.moe import MoEModel
from heapr.score.criterion import Unit
from heapr.types import Evaluation, Plan, Scores, Statistics, TokenWindows


@runtime_checkable
class Evaluator(Protocol):
    """Measures a dense or pruned model."""

    name: str
    uses_statistics: bool  # whether the metrics depend on the calibration statistics

    def identity(self) -> dict[str, Any]:
        """Everything that determines the metrics beside model and statistics; JSON types only."""
        ...

    def prepare(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Whatever can fail through a user's mistake; called before any expensive work.

        Raises:
            ConfigError: the evaluation cannot be done as asked.
        """
        ...

    def __call__(self, model: MoEModel, statistics: Statistics) -> Evaluation:
        """Metrics by contract name, and details, of which "protocols" says by corpus or task how they were measured.

        `statistics` are the dense model's.
        """
        ...


def measure(evaluator: Evaluator, model: MoEModel, statistics: Statistics) -> Evaluation:
    """What an evaluator finds, with the experts of dense and pruned models run by one and the same forward: transformers' own ones round
    differently, in bfloat16 by more than a light pruning changes."""
    with use_comparable_experts(model.model):
        return evaluator(model, statistics)


@dataclass(frozen=True)
class Material:
    """What a comparison may look at; models and tokens are loaded when they are asked for.

    Attributes:
        statistics: of the dense model on the calibration tokens.
        scores, unit: what the criterion said, and what its numbers are.
        widths: atomic experts of every expert before pruning, by decoder layer index.
        plan: what was removed; none for comparisons whose upstream is "score".
        tokens: gives the calibration tokens.
        dense: gives the dense model, for comparisons that need no pruned one.
        dense_and_pruned: gives both, which then are in memory at once.
    """

    statistics: Statistics
    scores: Scores
    unit: Unit
    widths: Mapping[int, Sequence[int]]
    plan: Plan | None
    tokens: Callable[[], TokenWindows]
    dense: Callable[[], MoEModel]
    dense_and_pruned: Callable[[], tuple[MoEModel, MoEModel]]


@runtime_checkable
class Comparison(Protocol):
    """Compares the dense with the pruned model, or what was predicted with what is."""

    name: str
    upstream: Literal["score", "prune"]  # the last stage whose result it looks at

    def identity(self) -> dict[str, Any]:
        """Everything that determines the metrics beside the results of the stages; JSON types only."""
        ...

    def prepare(self, source: ModelSource) -> None:
        """Whatever can fail through a user's mistake; called before any expensive work.

        Raises:
            ConfigError: the comparison cannot be done as asked.
        """
        ...

    def __call__(self, material: Material) -> Evaluation:
        """Metrics by contract name, and details."""
        ...
