"""What an evaluator is: a model in, metrics out. Each one's result is an artifact of its own.

Evaluators with a `corpus` argument are built once for every corpus of `evaluation.corpora`, those with a `task` argument once
for each of their `tasks`.
"""

from __future__ import annotations

from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from heapr.model.moe import MoEModel
from heapr.types import Measurement, Statistics


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

    def __call__(self, model: MoEModel, statistics: Statistics) -> Measurement:
        """Metrics by contract name, and under "protocol/<corpus or task>" how they were measured.

        `statistics` are the dense model's.
        """
        ...
