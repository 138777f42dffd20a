"""Allocation for one width per layer: the experts of a layer keep equally many atomic experts, layers differ.

In: scores of experts that have one width in each layer. Out: a `Plan`. Shape letters: E experts, F atomic
experts of an expert, M multiples of the budget's `width_multiple` in F.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from heapr.pruning.budget import Budget
from heapr.pruning.ranking import keep_number_of_each
from heapr.types import Plan


class _Step(NamedTuple):
    """A layer's next multiple, which all its experts lose together. The lowest `loss` goes first, then the
    first layer."""

    loss: float
    layer: int
    number: int
    size: int


def allocate_layer_widths(layers: Mapping[int, Tensor], budget: Budget) -> Plan:
    """A plan that keeps the best atomic experts of every expert, the same number in each expert of a layer.

    Multiples go one after the other, all experts of a layer losing their lowest one at a time, where the mean
    score of what goes is lowest. At least one multiple of each layer stays. As many go as come nearest to the
    ratio (the larger of two equally near numbers), so what a ratio removes, every higher one removes too.
    """
    steps: list[_Step] = []
    for index, scores_EF in layers.items():
        steps += _steps(index, scores_EF, budget.width_multiple)
    steps.sort()
    total = sum(scores_EF.numel() for scores_EF in layers.values())
    number = _number_nearest(steps, budget.ratio * total)
    width_of = {index: scores_EF.shape[1] for index, scores_EF in layers.items()}
    for step in steps[:number]:
        width_of[step.layer] -= budget.width_multiple
    kept = {}
    for index, scores_EF in layers.items():
        kept[index] = keep_number_of_each(scores_EF, width_of[index])
    return Plan(layers=kept)


def _number_nearest(steps: Sequence[_Step], wanted: float) -> int:
    """How many steps, taken in order, come nearest to the wanted number of atomic experts."""
    sizes = [step.size for step in steps]
    nearest, number = math.inf, 0
    for place, removed in enumerate(accumulate(sizes, initial=0)):
        miss = abs(removed - wanted)
        # Of two equally near numbers the larger.
        if miss <= nearest:
            nearest, number = miss, place
    return number


def _steps(index: int, scores_EF: Tensor, multiple: int) -> list[_Step]:
    """What a layer may lose, lowest first."""
    num_experts = len(scores_EF)
    sorted_EF = torch.sort(scores_EF, dim=1).values
    scores_EMC = sorted_EF.view(num_experts, -1, multiple)
    loss_M = scores_EMC.mean(dim=(0, 2))
    size = num_experts * multiple
    # The last multiple stays.
    losses = loss_M[:-1].tolist()
    return [_Step(loss, index, number, size) for number, loss in enumerate(losses)]
