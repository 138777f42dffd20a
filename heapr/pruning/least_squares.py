"""Ridge-regularized least squares: solved directly, or iteratively if a layer's equations are too large.

In: normal equations, or activations and their target. Out: changes of columns.
Shape letters: T tokens, D model width, n tokens of one expert, S kept atomic experts (of one expert, or of
the layer).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from heapr.pruning.activations import Activations
from heapr.pruning.blocks import BlockFactors, factored
from heapr.ranks import Ranks

logger = logging.getLogger(__name__)

ROWS = 128  # rows of a layer's normal equations that are computed at once
_TINY = 1e-30  # keeps a denominator of zeros from dividing by zero


def solve(C_SS: Tensor, B_SD: Tensor, ridge: float) -> Tensor:
    """(C + ridge I)^-1 B in float64."""
    return torch.cholesky_solve(B_SD, factored(C_SS, ridge))


def solve_directly(kept: Activations, lost_TD: Tensor, *, ridge: float, ranks: Ranks) -> Tensor:
    """What `solve_by_steps` approximates, from the normal equations of the whole layer.

    Arguments as there; float64 (S, D).

    Raises:
        ConfigError: see `solve`.
    """
    size = sum(kept.widths)
    model_width = lost_TD.shape[1]
    A_SS = torch.zeros(size, size, dtype=torch.float64, device=lost_TD.device)
    B_SD = torch.zeros(size, model_width, dtype=torch.float64, device=lost_TD.device)
    # Products of a chunk are float32, their sums float64.
    for chunk, z_tS in kept.chunks_of_z():
        # Only the lower triangle, because Cholesky reads nothing else.
        for first in range(0, size, ROWS):
            last = min(first + ROWS, size)
            rows_t = z_tS[:, first:last]
            A_SS[first:last, :last] += rows_t.T @ z_tS[:, :last]
        lost_tD = lost_TD[chunk]
        B_SD += z_tS.T @ lost_tD
    ranks.sum([A_SS, B_SD])
    r = ridge * mean_of([A_SS.diagonal()])
    return solve(A_SS, B_SD, r)


def solve_by_steps(
    kept: Activations,
    lost_TD: Tensor,
    *,
    ridge: float,
    tolerance: float,
    max_steps: int,
    ranks: Ranks,
) -> Tensor:
    """Return the change V of the columns, float64 (S, D), that minimizes

        f(V) = sum ||d - V^T z||^2 + r ||V||^2

    by conjugate gradients on (A + r I) V = B with A = sum z z^T and B = sum z d^T, for each output dimension
    separately. The preconditioner is block-diagonal: C + r I with C = sum z z^T of one expert. A is never
    formed, because A V = sum z (V^T z)^T. With g = B - (A + r I) V,

        f(V) - min f <= ||g||^2 / r

    because A + r I >= r I. The steps end when this bound is at most `tolerance` * f(V). If this takes more
    than `max_steps`, a warning reports the bound that was reached.

    Args:
        kept: the activations z.
        lost_TD: d, float32.
        ridge: r as a share of the mean diagonal of A.
        tolerance: in (0, 1).
        max_steps: at least 1.
        ranks: the processes that solve together; sums are over the tokens of all.

    Raises:
        ConfigError: see `solve`.
    """
    descent = _Descent(kept, lost_TD, ridge=ridge, ranks=ranks)
    for _ in range(max_steps):
        descent.step()
        if ranks.of_first(descent.excess <= tolerance * descent.objective):
            return descent.change_SD
        descent.turn()
    above = min(1.0, descent.excess / descent.objective)
    logger.warning(
        "repair: after max_steps=%d the error may be above its minimum by a share of %.2g (tolerance %g)",
        max_steps,
        above,
        tolerance,
    )
    return descent.change_SD


class _Descent:
    """Where the conjugate gradients of `solve_by_steps` are.

    Updates are in place, because each of the matrices (S, D) is as large as W_down.

    Attributes:
        change_SD: V.
        objective: f(V).
        excess: the bound on f(V) - min f.
    """

    def __init__(self, kept: Activations, lost_TD: Tensor, *, ridge: float, ranks: Ranks) -> None:
        self.objective = math.inf
        self.excess = math.inf
        self._kept = kept
        self._ranks = ranks
        self._blocks, self._r = _factored_blocks(kept, ridge, ranks)
        self._residual_TD = lost_TD.clone()
        self._gradient_SD = _pulled_back(kept, self._residual_TD, ranks)
        self.change_SD = torch.zeros_like(self._gradient_SD)
        self._direction_SD = self._blocks.solve(self._gradient_SD)
        self._slope_D = _column_products(self._gradient_SD, self._direction_SD)

    def step(self) -> None:
        """Go to the minimum along the direction."""
        image_TD = _applied(self._kept, self._direction_SD)
        product_SD = _pulled_back(self._kept, image_TD, self._ranks)
        product_SD.add_(self._direction_SD, alpha=self._r)
        curvature_D = _column_products(self._direction_SD, product_SD)
        step_D = self._slope_D / curvature_D.clamp(min=_TINY)
        self.change_SD.addcmul_(self._direction_SD, step_D)
        self._gradient_SD.addcmul_(product_SD, step_D, value=-1)
        self._residual_TD.addcmul_(image_TD, step_D.float(), value=-1)
        error = self._ranks.total(squared(self._residual_TD))
        self.objective = error + self._r * squared(self.change_SD)
        self.excess = squared(self._gradient_SD) / max(self._r, _TINY)

    def turn(self) -> None:
        """Take the next direction."""
        preconditioned_SD = self._blocks.solve(self._gradient_SD)
        slope_D = _column_products(self._gradient_SD, preconditioned_SD)
        ratio_D = slope_D / self._slope_D.clamp(min=_TINY)
        self._direction_SD.mul_(ratio_D).add_(preconditioned_SD)
        self._slope_D = slope_D


def _column_products(one_SD: Tensor, other_SD: Tensor) -> Tensor:
    """Inner product of two matrices' columns, for each output dimension (D,)."""
    return (one_SD * other_SD).sum(0)


def _factored_blocks(kept: Activations, ridge: float, ranks: Ranks) -> tuple[BlockFactors, float]:
    """Cholesky factors of C + r I of every expert, and r."""
    blocks = BlockFactors(kept.widths, kept.inputs.hidden_TD.device)
    for expert in range(len(kept.widths)):
        z_nS = kept.z(expert)
        blocks.set_block(expert, z_nS.T @ z_nS)
    ranks.sum(blocks.moments())
    r = ridge * mean_of([blocks.diagonal()])
    blocks.factor(r)
    return blocks, r


def _applied(kept: Activations, change_SD: Tensor) -> Tensor:
    """V^T z of every token (T, D), float32."""
    num_tokens = len(kept.inputs.hidden_TD)
    model_width = change_SD.shape[1]
    image_TD = torch.zeros(num_tokens, model_width, device=change_SD.device)
    for expert, block_SD in enumerate(change_SD.split(kept.widths)):
        image_nD = kept.z(expert) @ block_SD.float()
        token_n = kept.tokens(expert)
        image_TD.index_add_(0, token_n, image_nD)
    return image_TD


def _pulled_back(kept: Activations, image_TD: Tensor, ranks: Ranks) -> Tensor:
    """sum z d^T (S, D) over the tokens of all ranks, float64."""
    rows = []
    for expert in range(len(kept.widths)):
        token_n = kept.tokens(expert)
        image_nD = image_TD.index_select(0, token_n)
        own_SD = kept.z(expert).T @ image_nD
        rows.append(own_SD)
    pulled_SD = torch.cat(rows).double()
    ranks.sum([pulled_SD])
    return pulled_SD


def mean_of(diagonals: Sequence[Tensor]) -> float:
    """Mean over all entries of some diagonals; 0 if there are none."""
    diagonal = torch.cat(list(diagonals))
    if len(diagonal) == 0:
        return 0.0
    return float(diagonal.mean())


def squared(tensor: Tensor) -> float:
    """Sum of squares, added in float64."""
    return float(tensor.square().sum(dtype=torch.float64))
