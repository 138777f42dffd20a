"""Cholesky factors of all experts' blocks, factored and solved many at once.

In: widths, and each expert's second moments. Out: factors, and solutions of all blocks. On a GPU, widths are
rounded up so that a few batched calls serve a layer, where single ones would wait for the device each.
Shape letters: D model width, S atomic experts of one expert or of the layer, B experts of a bucket, W their
rounded width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from heapr.errors import ConfigError
from heapr.model.experts.packed import WIDTH_STEP, width_buckets

_TINY = 1e-30  # keeps the zero matrix of an expert that no token reached invertible
AT_ONCE = 32  # blocks that a GPU factors in one call; a CPU factors one


class _Bucket(NamedTuple):
    """Experts whose blocks have one size once their widths are rounded up.

    Attributes:
        members: the experts.
        factor_BWW: their factors, with the identity in rows and columns beyond an expert's own.
        row_S: the rows of the layer that they own.
        place_S: where these rows are in (B * W).
    """

    members: list[int]
    factor_BWW: Tensor
    row_S: Tensor
    place_S: Tensor


class BlockFactors:
    """(C + r I)^-1 for every expert, float64, with C given expert by expert, then `factor`.

    Args:
        widths: of every expert.
        device: of the blocks.
    """

    def __init__(self, widths: Sequence[int], device: torch.device) -> None:
        self.widths = list(widths)
        size = sum(self.widths)
        on_gpu = device.type == "cuda"
        self._at_once = AT_ONCE if on_gpu else 1
        step = WIDTH_STEP if on_gpu else 1
        row_S = torch.arange(size, device=device)
        row_E = row_S.split(self.widths)
        self._buckets: list[_Bucket] = []
        self._where: dict[int, Tensor] = {}
        for width, members in width_buckets(self.widths, step).items():
            if width == 0:
                continue
            rows = [row_E[expert] for expert in members]
            bucket = _empty_bucket(members, rows, width)
            self._buckets.append(bucket)
            for expert, block_WW in zip(members, bucket.factor_BWW, strict=True):
                self._where[expert] = block_WW

    def set_block(self, expert: int, C_SS: Tensor) -> None:
        """Give an expert's C; an expert of width 0 has none."""
        if expert in self._where:
            width = self.widths[expert]
            self._where[expert][:width, :width] = C_SS

    def moments(self) -> list[Tensor]:
        """All C, those of one rounded width in one tensor; what is added to them is added in place."""
        return [bucket.factor_BWW for bucket in self._buckets]

    def diagonal(self) -> Tensor:
        """The diagonals of all C (S,)."""
        if not self._where:
            return torch.zeros(0, dtype=torch.float64)
        diagonals = []
        for expert in sorted(self._where):
            diagonal_W = self._where[expert].diagonal()
            diagonals.append(diagonal_W[: self.widths[expert]])
        return torch.cat(diagonals)

    def factor(self, ridge: float) -> None:
        """Replace every C with the Cholesky factor of C + ridge I.

        Raises:
            ConfigError: see `factored`.
        """
        for bucket in self._buckets:
            for expert, block_WW in zip(bucket.members, bucket.factor_BWW, strict=True):
                beyond = block_WW.diagonal()[self.widths[expert] :]
                beyond.fill_(1)
            for some_BWW in bucket.factor_BWW.split(self._at_once):
                some_BWW.copy_(factored(some_BWW, ridge))

    def solve(self, right_SD: Tensor) -> Tensor:
        """(C + ridge I)^-1 times each expert's rows: (S, D)."""
        solved_SD = torch.empty_like(right_SD)
        for bucket in self._buckets:
            num_blocks, width, _ = bucket.factor_BWW.shape
            padded_SD = right_SD.new_zeros(num_blocks * width, right_SD.shape[1])
            padded_SD[bucket.place_S] = right_SD[bucket.row_S]
            padded_BWD = padded_SD.view(num_blocks, width, -1)
            answer_BWD = torch.cholesky_solve(padded_BWD, bucket.factor_BWW)
            answer_SD = answer_BWD.flatten(0, 1)
            solved_SD[bucket.row_S] = answer_SD[bucket.place_S]
        return solved_SD


def _empty_bucket(members: list[int], rows: Sequence[Tensor], width: int) -> _Bucket:
    """A bucket whose blocks are zero.

    Args:
        members: the experts.
        rows: the rows of the layer that each of them owns.
        width: their rounded width.
    """
    device = rows[0].device
    factor_BWW = torch.zeros(len(members), width, width, dtype=torch.float64, device=device)
    places = []
    for number, row_n in enumerate(rows):
        place_n = torch.arange(len(row_n), device=device)
        places.append(number * width + place_n)
    return _Bucket(members, factor_BWW, torch.cat(list(rows)), torch.cat(places))


def factored(C_SS: Tensor, ridge: float) -> Tensor:
    """Cholesky factor of C + ridge I; C may be a batch (B, W, W).

    Raises:
        ConfigError: the ridge is so small that the matrix is singular in floating point.
        FloatingPointError: C is NaN or infinite.
    """
    size = C_SS.shape[-1]
    identity_SS = torch.eye(size, dtype=C_SS.dtype, device=C_SS.device)
    regular_SS = C_SS + max(ridge, _TINY) * identity_SS
    factor_SS: Tensor
    factor_SS, failed = torch.linalg.cholesky_ex(regular_SS)
    if failed.any() and not regular_SS.isfinite().all():
        raise FloatingPointError("the equations are NaN or infinite")
    if failed.any():
        reason = "pruning.repair.ridge is too small for these activations: the equations are singular"
        raise ConfigError(f"{reason}; give for example 0.01")
    return factor_SS
