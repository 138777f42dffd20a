"""Take atomic experts out for a while: a context manager that restores the dense model bit by bit.

In: a model and what to take out. Out: the same model, in the same shape.
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
    """Inside, the columns w_k of W_down of the removed atomic experts are zero (docs/method.md, 2), so that
    they contribute nothing.

    Args:
        model: dense or ragged.
        removed: bool (E, F) by decoder layer index, true = removed; layers may be left out, or lose
            everything.
    """
    layers = {layer.index: layer for layer in model.layers}
    saved: list[tuple[Tensor, Tensor, Tensor]] = []
    with torch.no_grad():
        for index, removed_EF in removed.items():
            for removed_F, matrices in zip(removed_EF, matrices_of(layers[index].experts), strict=True):
                down_DF = matrices.down_DF
                atomic_r = removed_F[: down_DF.shape[1]].nonzero().flatten().to(down_DF.device)
                column_Dr = down_DF[:, atomic_r]
                saved.append((down_DF, atomic_r, column_Dr))
                down_DF[:, atomic_r] = 0
    try:
        yield
    finally:
        with torch.no_grad():
            for down_DF, atomic_r, column_Dr in saved:
                down_DF[:, atomic_r] = column_Dr
