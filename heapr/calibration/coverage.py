"""How well the calibration covers the experts: least and median number of tokens, and how many got none.

In: statistics. Out: one line in the log, and a warning if half of the experts saw too few tokens for reliable
scores.
Shape letters: E experts.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch

from heapr.types import Statistics

logger = logging.getLogger(__name__)

FEW_TOKENS = 32  # for the median expert; scores are means over an expert's tokens


def report_coverage(statistics: Statistics, widths: Mapping[int, Sequence[int]]) -> None:
    """Log how many tokens were routed to an expert, over the experts of all layers.

    Args:
        statistics: the calibration's statistics.
        widths: atomic experts of every expert, by decoder layer; experts without any are not counted.
    """
    counts = {}
    missed = {}
    for index, layer in statistics.layers.items():
        has_atomic_E = torch.tensor(widths[index]) > 0
        counts[index] = layer.count_E.cpu()[has_atomic_E]
        missed[index] = int((counts[index] == 0).sum())
    count_E = torch.cat(list(counts.values()))
    least = count_E.min().item()
    median = count_E.quantile(0.5).item()
    worst = max(missed, key=lambda index: missed[index])
    place = f", most of them in layer {worst} ({missed[worst]})" if missed[worst] else ""
    logger.info(
        "%-9s tokens per expert: least %d, median %g; %d of %d experts not reached%s",
        "calibrate", least, median, sum(missed.values()), len(count_E), place,
    )  # fmt: skip
    if median < FEW_TOKENS:
        logger.warning(
            "half of the experts saw at most %g of the %d calibration tokens: below %d, scores are"
            " unreliable; raise calibration.num_samples or calibration.sequence_length",
            median, statistics.num_tokens, FEW_TOKENS,
        )  # fmt: skip
