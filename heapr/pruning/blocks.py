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
        on_gpu = device.type == "cuda"
        self._at_once = AT_ONCE if on_gpu else 1
        buckets = width_buckets(self.widths, WIDTH_STEP if on_gpu else 1)
        rows_of = torch.arange(sum(self.widths), device=device).split(self.widths)
        self._buckets, self._where = [], {}
        for width, members in buckets.items():
            if width == 0:
                continue
            factor_BWW = torch.zeros(len(members), width, width, dtype=torch.float64, device=device)
            row_S = torch.cat([rows_of[expert] for expert in members])
            places = []
            for place, expert in enumerate(members):
                self._where[expert] = factor_BWW[place]
                places.append(place * width + torch.arange(self.widths[expert], device=device))
            self._buckets.append(_Bucket(members, factor_BWW, row_S, torch.cat(places)))

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
        diagonals = [self._where[expert].diagonal()[: self.widths[expert]] for expert in sorted(self._where)]
        return torch.cat(diagonals) if diagonals else torch.zeros(0, dtype=torch.float64)

    def factor(self, ridge: float) -> None:
        """Replace every C with the Cholesky factor of C + ridge I.

        Raises:
            ConfigError: see `factored`.
        """
        for bucket in self._buckets:
            num_missing_B = [bucket.factor_BWW.shape[1] - self.widths[expert] for expert in bucket.members]
            for block_WW, num_missing in zip(bucket.factor_BWW, num_missing_B, strict=True):
                if num_missing:
                    block_WW.diagonal()[-num_missing:] = 1
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
            solved_SD[bucket.row_S] = answer_BWD.flatten(0, 1)[bucket.place_S]
        return solved_SD


def factored(C_SS: Tensor, ridge: float) -> Tensor:
    """Cholesky factor of C + ridge I; C may be a batch (B, W, W).

    Raises:
        ConfigError: the ridge is so small that the matrix is singular in floating point.
    """
    identity_SS = torch.eye(C_SS.shape[-1], dtype=C_SS.dtype, device=C_SS.device)
    regular_SS = C_SS + max(ridge, _TINY) * identity_SS
    factor_SS: Tensor
    factor_SS, failed = torch.linalg.cholesky_ex(regular_SS)
    if failed.any():
        reason = "pruning.repair.ridge is too small for these activations: the equations are singular"
        raise ConfigError(f"{reason}; give for example 0.01")
    return factor_SS
