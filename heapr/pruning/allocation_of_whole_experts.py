"""Allocation for criteria that remove whole experts.

In: scores that all atomic experts of an expert share. Out: a `Plan`.
Shape letters: E experts, F atomic experts of the widest expert.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from heapr.pruning.budget import Budget, Widths
from heapr.pruning.ranking import highest
from heapr.types import Plan


class _Piece(NamedTuple):
    """An expert that may be removed. Pieces are removed in order of `place`, then of layer and expert."""

    place: float
    layer: int
    expert: int
    width: int


def allocate_whole_experts(layers: Mapping[int, Tensor], widths: Widths, budget: Budget) -> Plan:
    """Return the plan of whole experts whose number of atomic experts is nearest to the ratio.

    Of two equally near numbers, the larger is removed. With scope "layer", all layers lose the same share, to
    within half an expert. Each layer keeps its K best experts.
    """
    pieces: list[_Piece] = []
    for index, scores_EF in layers.items():
        width_E = widths[index]
        of_layer = _removable(index, scores_EF, width_E, budget.experts_per_token)
        if budget.scope == "layer":
            of_layer = _at_shares(of_layer, sum(width_E))
        pieces += of_layer
    pieces.sort()
    sizes = map(sum, widths.values())
    wanted = budget.ratio * sum(sizes)
    number = _number_nearest(pieces, wanted)
    if budget.num_experts is not None:
        removed = [len(width_E) - budget.num_experts for width_E in widths.values()]
        number = sum(removed)
    kept = {index: scores_EF > -math.inf for index, scores_EF in layers.items()}
    for piece in pieces[:number]:
        kept[piece.layer][piece.expert] = False
    return Plan(layers=kept)


def _removable(index: int, scores_EF: Tensor, width_E: Sequence[int], experts_per_token: int) -> list[_Piece]:
    """A layer's experts, lowest score first, without empty experts and without the K best."""
    score_E = scores_EF.amax(dim=1)
    best = highest(score_E, experts_per_token)
    pieces = []
    for expert, width in enumerate(width_E):
        if width and expert not in best:
            score = float(score_E[expert])
            pieces.append(_Piece(score, index, expert, width))
    return sorted(pieces)


def _at_shares(pieces: Sequence[_Piece], size: int) -> list[_Piece]:
    """Place each expert at the mean of the shares of its layer that are gone before and after it.

    Args:
        pieces: of one layer, in the order in which they are removed.
        size: atomic experts of the layer.
    """
    placed = []
    before = 0
    for piece in pieces:
        after = before + piece.width
        middle = (before + after) / 2 / size
        placed.append(piece._replace(place=middle))
        before = after
    return placed


def _number_nearest(pieces: Sequence[_Piece], wanted: float) -> int:
    """How many pieces, taken in order, come nearest to the wanted number of atomic experts."""
    before = 0
    for number, piece in enumerate(pieces):
        after = before + piece.width
        if abs(after - wanted) > abs(before - wanted):
            return number
        before = after
    return len(pieces)
