"""Allocation: from scores to a plan. How many atomic experts go, and where; nothing about models.

In: scores and a ratio. Out: a `Plan` that removes exactly round(ratio * number of atomic experts), whatever the scope.
Shape letters: E experts, F atomic experts of an expert.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from heapr.errors import ConfigError
from heapr.types import Plan, Scores

SCOPES = ("global", "layer", "expert")


def allocate(scores: Scores, *, ratio: float, scope: str) -> Plan:
    """Remove the lowest-scoring atomic experts.

    Args:
        scores: bigger is more important.
        ratio: share of all routed atomic experts to remove, in [0, 1).
        scope: what is ranked together: "global" all layers (HEAPr-G of the paper), "layer" each layer by itself
            (HEAPr-L), "expert" each expert by itself. Within "layer" and "expert" every group loses the same share,
            up to one atomic expert, so that the total is exact.

    Equal scores are removed in order of layer, expert and atomic expert. The best atomic expert of every layer always
    stays, so no layer loses all of its experts.

    Raises:
        ConfigError: unknown scope, ratio outside [0, 1), or so high that a layer would be emptied.
    """
    if not 0 <= ratio < 1:
        raise ConfigError(f"pruning.ratio={ratio} is not in [0, 1); give the share of atomic experts to remove, for example 0.25")
    if scope not in SCOPES:
        raise ConfigError(f"pruning.scope='{scope}' is unknown; choose one of {', '.join(SCOPES)}")
    flat = torch.cat([_protect_best(scores_EF).flatten() for scores_EF in scores.layers.values()])
    kept = torch.ones(len(flat), dtype=torch.bool)
    start = 0
    for size, num_removed in zip(*_groups(scores, ratio, scope), strict=True):
        group = flat[start : start + size]
        lowest = torch.sort(group, stable=True).indices[:num_removed]
        if num_removed and group[lowest].isinf().any():
            raise ConfigError(f"pruning.ratio={ratio} would remove every atomic expert of a layer; choose a lower ratio")
        kept[start + lowest] = False
        start += size
    shapes = [scores_EF.shape for scores_EF in scores.layers.values()]
    parts = kept.split([shape.numel() for shape in shapes])
    return Plan(layers={index: part.view(shape) for index, part, shape in zip(scores.layers, parts, shapes, strict=True)})


def _protect_best(scores_EF: Tensor) -> Tensor:
    """Scores with the layer's best atomic expert (the first of equals) raised to infinity."""
    protected = scores_EF.clone()
    protected.view(-1)[scores_EF.argmax()] = math.inf
    return protected


def _groups(scores: Scores, ratio: float, scope: str) -> tuple[list[int], list[int]]:
    """Sizes of the groups that are ranked by themselves, and how many atomic experts each loses.

    Boundaries are rounded, not groups: the losses of any run of groups add up to its share within one.
    """
    shapes = [scores_EF.shape for scores_EF in scores.layers.values()]
    if scope == "global":
        sizes = [sum(shape.numel() for shape in shapes)]
    elif scope == "layer":
        sizes = [shape.numel() for shape in shapes]
    else:
        sizes = [shape[1] for shape in shapes for _ in range(shape[0])]
    ends = torch.tensor(sizes).cumsum(0).tolist()
    removed_before = [0] + [math.floor(ratio * end + 0.5) for end in ends]
    return sizes, [after - before for before, after in zip(removed_before, removed_before[1:], strict=False)]
