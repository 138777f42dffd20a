"""Allocation for criteria that remove whole experts.

In: scores that all atomic experts of an expert share. Out: a `Plan`. Shape letters: E experts, F atomic
experts of the widest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

from torch import Tensor

from heapr.pruning.budget import Budget, Widths
from heapr.pruning.ranking import highest
from heapr.types import Plan


class _Piece(NamedTuple):
    """An expert that may go. They go in order of `place`, then of layer and expert."""

    place: float
    layer: int
    expert: int
    width: int


def allocate_whole_experts(layers: Mapping[int, Tensor], widths: Widths, budget: Budget) -> Plan:
    """A plan that keeps or removes experts as a whole, in number as near to the ratio as they come (the
    larger of two equally near numbers). Layers ("layer") lose the same share, to within half an expert. Each
    layer's K best experts stay."""
    pieces: list[_Piece] = []
    for index, scores_EF in layers.items():
        of_layer = sorted(_removable(index, scores_EF, widths[index], budget.experts_per_token))
        pieces += of_layer if budget.scope == "global" else _at_shares(of_layer, sum(widths[index]))
    pieces.sort()
    total = sum(sum(width_E) for width_E in widths.values())
    kept = {index: scores_EF > -math.inf for index, scores_EF in layers.items()}
    for piece in pieces[: _number_nearest(pieces, budget.ratio * total)]:
        kept[piece.layer][piece.expert] = False
    return Plan(layers=kept)


def _removable(index: int, scores_EF: Tensor, width_E: Sequence[int], experts_per_token: int) -> list[_Piece]:
    """The experts of a layer that have atomic experts and are not among the K best, each at its score."""
    score_E = scores_EF.amax(dim=1)
    best = highest(score_E, experts_per_token)
    others = [expert for expert in range(len(width_E)) if width_E[expert] and expert not in best]
    return [_Piece(float(score_E[expert]), index, expert, width_E[expert]) for expert in others]


def _at_shares(pieces: Sequence[_Piece], size: int) -> list[_Piece]:
    """The same experts of a layer of `size` atomic experts, lowest first, each at the middle of the shares
    that are gone before and after it."""
    ends = accumulate((piece.width for piece in pieces), initial=0)
    middles = [(start + end) / 2 / size for start, end in pairwise(ends)]
    return [piece._replace(place=middle) for piece, middle in zip(pieces, middles, strict=True)]


def _number_nearest(pieces: Sequence[_Piece], wanted: float) -> int:
    """How many of the first pieces come nearest to the wanted number of atomic experts."""
    removed = list(accumulate((piece.width for piece in pieces), initial=0))
    misses = [abs(total - wanted) for total in removed]
    return max(range(len(misses)), key=lambda number: (-misses[number], number))
