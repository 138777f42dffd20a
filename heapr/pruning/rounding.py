"""Whole numbers near to what a ratio asks for: widths near to one, and equal shares of a number.

Needs no model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def near_widths(width: int, ratio: float, multiple: int) -> list[int]:
    """Widths at a distance below `multiple` from width * (1 - ratio), nearest first.

    Of two equally near widths, the larger comes first. Candidates are the positive multiples and the present
    width.
    """
    # Rounded, because 80 * (1 - 0.9) is 7.999999999999998.
    exact = round(width * (1 - ratio), 9)
    candidates = {*range(multiple, width + 1, multiple), width}

    def distance(candidate: int) -> float:
        return abs(candidate - exact)

    near = [each for each in candidates if distance(each) < multiple]
    largest_first = sorted(near, reverse=True)
    return sorted(largest_first, key=distance)


def equal_shares(sizes: Sequence[int], number: int) -> list[int]:
    """How many of `number` items each group gives, such that all give the same share.

    The j-th item of a group of size s is placed at the share (j - 1/2) / s, and the first `number` of all
    items are counted; of equal shares, the first group's. So each group gives t s, rounded to the nearest
    integer, with one share t for all groups, and no group gives fewer when `number` grows.
    """
    total = sum(sizes)
    # Up to the share (number - margin) / total there are at most `number` items.
    margin = len(sizes) / 2 + 1
    counts = []
    for size in sizes:
        share = size * (number - margin) / total
        count = math.ceil(share - 0.5)
        counts.append(max(0, count))
    groups = [group for group, size in enumerate(sizes) if size]

    def share_of_next(group: int) -> float:
        return (counts[group] + 0.5) / sizes[group]

    while sum(counts) < number:
        group = min(groups, key=share_of_next)
        counts[group] += 1
    return counts


def round_half_up(number: float) -> int:
    """The nearest integer; of two equally near ones the larger."""
    return math.floor(number + 0.5)
