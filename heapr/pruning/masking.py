"""Mask atomic experts temporarily: a context manager that restores the model bit for bit.

In: a model and the atomic experts to mask. Out: the same model, in the same shape.
Shape letters: D model width, E experts, F atomic experts of an expert, r removed atomic experts of one
expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from heapr.model.experts.layout import matrices_of
from heapr.model.moe import MoEModel


@contextmanager
def masked(model: MoEModel, removed: Mapping[int, Tensor]) -> Iterator[None]:
    """Set the columns w_k of W_down of the removed atomic experts to zero inside the context.

    They then contribute nothing to the output (docs/method.md, 2).

    Args:
        model: dense or ragged.
        removed: bool (E, F) by decoder layer index, True for what is removed. Layers may be left out, or
            lose everything.
    """
    layers = {layer.index: layer for layer in model.layers}
    saved: list[tuple[Tensor, Tensor, Tensor]] = []
    with torch.no_grad():
        for index, removed_EF in removed.items():
            experts = matrices_of(layers[index].experts)
            for removed_F, matrices in zip(removed_EF, experts, strict=True):
                down_DF = matrices.down_DF
                width = down_DF.shape[1]
                atomic_r = removed_F[:width].nonzero().flatten().to(down_DF.device)
                column_Dr = down_DF[:, atomic_r]
                saved.append((down_DF, atomic_r, column_Dr))
                down_DF[:, atomic_r] = 0
    try:
        yield
    finally:
        with torch.no_grad():
            for down_DF, atomic_r, column_Dr in saved:
                down_DF[:, atomic_r] = column_Dr
