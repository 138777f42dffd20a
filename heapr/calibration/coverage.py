"""How well the calibration covers the experts: least and median number of tokens, and which layers' got none.

In: statistics. Out: a `Coverage`, one line in the log, and a warning if half of the experts saw too few
tokens for reliable scores.
Shape letters: E experts.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from heapr.types import Statistics

logger = logging.getLogger(__name__)

FEW_TOKENS = 32  # for the median expert; scores are means over an expert's tokens
NUM_NAMED = 4  # layers


@dataclass(frozen=True)
class Coverage:
    """Numbers of tokens that were routed to an expert, over the experts of all layers.

    Experts without atomic experts are not counted.

    Attributes:
        num_tokens: of the calibration.
        num_experts: that are counted.
        least, median: tokens per expert.
        is_low: whether the median is below `FEW_TOKENS`.
        not_reached: number of experts that no token was routed to, by decoder layer index; only layers with
            such experts.
    """

    num_tokens: int
    num_experts: int
    least: int
    median: float
    is_low: bool
    not_reached: Mapping[int, int]

    @property
    def num_not_reached(self) -> int:
        return sum(self.not_reached.values())

    @property
    def metrics(self) -> dict[str, float]:
        """Its numbers by the names under which they are tracked."""
        return {
            "calibration/tokens_per_expert_least": self.least,
            "calibration/tokens_per_expert_median": self.median,
            "calibration/experts_not_reached": self.num_not_reached,
        }

    @property
    def where_not_reached(self) -> str:
        """The layers with experts that were not reached, those with most of them first, in words."""
        layers = sorted(self.not_reached, key=lambda index: -self.not_reached[index])
        named = [f"{self.not_reached[index]} in layer {index}" for index in layers[:NUM_NAMED]]
        others = layers[NUM_NAMED:]
        if others:
            rest = sum(self.not_reached[index] for index in others)
            named.append(f"{rest} in {len(others)} other layers")
        return ", ".join(named)


def coverage_of(statistics: Statistics, widths: Mapping[int, Sequence[int]]) -> Coverage:
    """How well the experts were covered.

    Args:
        statistics: the calibration's statistics.
        widths: atomic experts of every expert, by decoder layer index.
    """
    counts = []
    not_reached = {}
    for index, layer in statistics.layers.items():
        has_atomic_E = torch.tensor(widths[index]) > 0
        count_E = layer.count_E.cpu()[has_atomic_E]
        counts.append(count_E)
        missed = int((count_E == 0).sum())
        if missed:
            not_reached[index] = missed
    count_E = torch.cat(counts)
    median = count_E.quantile(0.5).item()
    return Coverage(
        num_tokens=statistics.num_tokens,
        num_experts=len(count_E),
        least=int(count_E.min()),
        median=median,
        is_low=median < FEW_TOKENS,
        not_reached=not_reached,
    )


def report_coverage(coverage: Coverage) -> None:
    """Log how many tokens were routed to an expert, and warn if they are few."""
    where = f" ({coverage.where_not_reached})" if coverage.not_reached else ""
    logger.info(
        "%-9s tokens per expert: least %d, median %g; %d of %d experts not reached%s",
        "calibrate", coverage.least, coverage.median, coverage.num_not_reached, coverage.num_experts, where,
    )  # fmt: skip
    if coverage.is_low:
        logger.warning(
            "half of the experts saw at most %g of the %d calibration tokens: below %d, scores are"
            " unreliable; raise calibration.num_samples or calibration.sequence_length",
            coverage.median, coverage.num_tokens, FEW_TOKENS,
        )  # fmt: skip
