"""How well the calibration covers the experts: tokens of the least and the median one, and how many were not
reached.

In: statistics. Out: one line in the log, and a warning where half of the experts saw fewer tokens than scores
can be told from.
Shape letters: E experts.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch

from heapr.types import Statistics

logger = logging.getLogger(__name__)

FEW_TOKENS = 32  # of the median expert; scores are means over the tokens of an expert


def report_coverage(statistics: Statistics, widths: Mapping[int, Sequence[int]]) -> None:
    """Say how many tokens were routed to an expert, over the experts of all layers.

    Args:
        statistics: of the calibration.
        widths: atomic experts of every expert, by decoder layer; one that has none cannot be scored and does
            not count.
    """
    counts = {
        index: layer.count_E.cpu()[torch.tensor(widths[index]) > 0]
        for index, layer in statistics.layers.items()
    }
    count_E = torch.cat(list(counts.values()))
    # Of an even number, the mean of the two in the middle.
    least, median = (
        count_E.min().item(),
        count_E.quantile(0.5).item(),
    )
    missed = {index: int((layer_E == 0).sum()) for index, layer_E in counts.items()}
    worst = max(missed, key=lambda index: missed[index])
    place = f", most of them in layer {worst} ({missed[worst]})" if missed[worst] else ""
    logger.info(
        "%-9s tokens per expert: least %d, median %g; %d of %d experts not reached%s",
        "calibrate", least, median, sum(missed.values()), len(count_E), place,
    )  # fmt: skip
    if median < FEW_TOKENS:
        logger.warning(
            "half of the experts saw at most %g of the %d calibration tokens: below %d, scores say little; "
            "raise calibration.num_samples or calibration.sequence_length",
            median, statistics.num_tokens, FEW_TOKENS,
        )  # fmt: skip
