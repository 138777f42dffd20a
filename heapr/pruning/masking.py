"""Do without some atomic experts for a while: a context manager that gives the dense model back bit by bit.

In: a dense model and what to do without. Out: the same model, in the same shape. It knows no layout: `MoELayer.weights`
gives views of the model's own memory, whatever the family.
Shape letters: D model width, E experts, F atomic experts of an expert, r removed atomic experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from heapr.model.moe import MoEModel


@contextmanager
def masked(model: MoEModel, removed: Mapping[int, Tensor]) -> Iterator[None]:
    """Inside, the columns w_k of W_down of the removed atomic experts are zero (docs/method.md, 2): they contribute nothing.

    Args:
        model: dense.
        removed: bool (E, F) by decoder layer index, true = removed; layers may be left out, or lose everything.
    """
    layers = {layer.index: layer for layer in model.layers}
    saved: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    with torch.no_grad():
        for index, removed_EF in removed.items():
            down_EDF = layers[index].weights().down_EDF
            expert_r, atomic_r = removed_EF.to(down_EDF.device).nonzero(as_tuple=True)
            saved.append((down_EDF, expert_r, atomic_r, down_EDF[expert_r, :, atomic_r]))
            down_EDF[expert_r, :, atomic_r] = 0
    try:
        yield
    finally:
        with torch.no_grad():
            for down_EDF, expert_r, atomic_r, column_rD in saved:
                down_EDF[expert_r, :, atomic_r] = column_rD
