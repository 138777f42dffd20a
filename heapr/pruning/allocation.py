"""Allocation: from scores to a plan. How many atomic experts go, and where; nothing about models.

In: scores and a ratio. Out: a `Plan` that removes exactly round(ratio * number of atomic experts), whatever the scope.
Shape letters: E experts, F atomic experts of an expert.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from heapr.errors import ConfigError
from heapr.types import Plan, Scores


def allocate(scores: Scores, *, ratio: float, scope: str) -> Plan:
    """Remove the lowest-scoring atomic experts.

    Args:
        scores: bigger is more important.
        ratio: share of all routed atomic experts to remove, in [0, 1).
        scope: what is ranked together: "global" all layers (HEAPr-G of the paper), "layer" each layer by itself
            (HEAPr-L), "expert" each expert by itself. Layers ("layer", "expert") and experts ("expert") lose the same
            number, up to one, so that the total is exact.

    Equal scores are removed in order of layer, expert and atomic expert. The best atomic expert of every layer always
    stays, so no layer loses all of its experts.

    Raises:
        ConfigError: the ratio is so high that a layer would be emptied.
    """
    protected = [_protect_best(scores_EF) for scores_EF in scores.layers.values()]
    sizes = [scores_EF.numel() for scores_EF in protected]
    numbers = numbers_removed(sizes, ratio=ratio, scope=scope)
    if scope == "global":
        kept_flat = _keep_highest(torch.cat([scores_EF.flatten() for scores_EF in protected]), numbers[0])
        kept = [part.view_as(scores_EF) for part, scores_EF in zip(kept_flat.split(sizes), protected, strict=True)]
    else:
        keep = _keep_highest if scope == "layer" else _keep_highest_of_each_expert
        kept = [keep(scores_EF, number) for scores_EF, number in zip(protected, numbers, strict=True)]
    return Plan(layers=dict(zip(scores.layers, kept, strict=True)))


def numbers_removed(sizes: Sequence[int], *, ratio: float, scope: str) -> list[int]:
    """How many atomic experts go: one number for all layers ("global"), else one per layer.

    Args:
        sizes: atomic experts of each layer.
        ratio, scope: as in `allocate`.

    Raises:
        ConfigError: a layer would be emptied.
    """
    assert 0 <= ratio < 1 and scope in {"global", "layer", "expert"}, (ratio, scope)
    before = [0] + [round_half_up(ratio * end) for end in accumulate(sizes)]
    if scope == "global":
        numbers, most = before[-1:], [sum(sizes) - len(sizes)]  # one of each layer stays
    else:  # boundaries are rounded, not shares, so that the total is exact
        numbers, most = [end - start for start, end in pairwise(before)], [size - 1 for size in sizes]
    if any(number > limit for number, limit in zip(numbers, most, strict=True)):
        raise ConfigError(f"pruning.ratio={ratio} with scope '{scope}' would remove every atomic expert of a layer; choose a lower ratio")
    return numbers


def round_half_up(number: float) -> int:
    return math.floor(number + 0.5)


def _protect_best(scores_EF: Tensor) -> Tensor:
    """Scores with the layer's best atomic expert (the first of equals) raised to infinity."""
    protected = scores_EF.clone()
    protected.view(-1)[scores_EF.argmax()] = math.inf
    return protected


def _keep_highest(scores: Tensor, num_removed: int) -> Tensor:
    """Mask without the lowest scores; of equal ones the first go."""
    kept = torch.ones(scores.numel(), dtype=torch.bool)
    kept[torch.sort(scores.flatten(), stable=True).indices[:num_removed]] = False
    return kept.view_as(scores)


def _keep_highest_of_each_expert(scores_EF: Tensor, num_removed: int) -> Tensor:
    """Every expert loses the same number; what does not divide is taken from those whose next atomic expert scores lowest."""
    base, extra = divmod(num_removed, len(scores_EF))
    number_E = torch.full((len(scores_EF),), base)
    if extra:
        next_E = scores_EF.sort(dim=1).values[:, base]
        number_E[torch.sort(next_E, stable=True).indices[:extra]] += 1
    return torch.stack([_keep_highest(scores_F, int(number)) for scores_F, number in zip(scores_EF, number_E, strict=True)])
