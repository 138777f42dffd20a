"""Refit of the rows of W_gate and W_up that are left: one Gauss-Newton step for a layer, by conjugate gradients.

In: pruned experts, what flows into them, and what the layer's output lost. Out: a change of the input projections.
docs/method.md, 22 and 23. No loss, no gradient of the model: the layer's output is the target.
Shape letters: T tokens, D model width, n tokens of one expert, S atomic experts of one expert, G rows of its input projection.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from heapr.pruning.activations import Activations

Change = list[Tensor]  # (G, D) for each expert


def refit_inputs(kept: Activations, lost_TD: Tensor, *, ridge: float, num_steps: int) -> Change:
    """The change of the rows that makes up for what was lost, to first order.

    With J the derivative of the layer's output by the rows a_r (r of W_gate and W_up) of all experts,

        sum over tokens of p (dh_k/da_r) (change_r . x) w_k,

    it minimises sum ||J change - d||^2 + q sum_r change_r M change_r by `num_steps` steps of conjugate gradients, where
    M = mean(x x^T) + ridge * mean(diag) I, s_r = sum (p dh_k/da_r)^2 ||w_k||^2 and q = ridge * mean(s). Preconditioned by (s_r + q) M,
    which is the exact matrix if inputs and slopes were independent and rows did not interact.

    Args:
        kept: the pruned experts at work.
        lost_TD: d, what the layer's output lost.
        ridge: above 0.
        num_steps: at least 1.

    Returns:
        the change (G, D) for each expert, float32.
    """
    problem = _Problem(kept, ridge)
    residual = problem.transposed(lost_TD)
    change = [torch.zeros_like(rows_GD) for rows_GD in residual]
    direction = problem.precondition(residual)
    size = _dot(residual, direction)
    for _ in range(num_steps):  # in place: each of these is as large as W_gate and W_up together
        if size <= 0:  # nothing is lost, or solved exactly
            break
        image = problem.normal(direction)
        step = size / _dot(direction, image)
        _add(change, step, direction)
        _add(residual, -step, image)
        del image
        preconditioned = problem.precondition(residual)
        size, previous = _dot(residual, preconditioned), size
        _add(preconditioned, size / previous, direction)
        direction = preconditioned
    return change


class _Problem:
    """The linearised layer. Slopes, T * K * G values, are kept."""

    def __init__(self, kept: Activations, ridge: float) -> None:
        self.kept = kept
        self.slopes = [kept.p(expert) * kept.slopes(expert) for expert in range(len(kept.widths))]
        self.scales = [self._scale(expert) for expert in range(len(kept.widths))]
        hidden_TD = kept.inputs.hidden_TD.float()
        self.moment_DD = hidden_TD.T @ hidden_TD / max(1, len(hidden_TD))
        self.moment_DD.diagonal().add_(ridge * self.moment_DD.diagonal().mean())
        self.inverse_DD = torch.linalg.inv(self.moment_DD.double()).float()
        self.penalty = ridge * float(torch.cat(self.scales).mean())

    def normal(self, change: Change) -> Change:
        """(J^T J + q M) change."""
        image = self.transposed(self._applied(change))
        return [image_GD + self.penalty * change_GD @ self.moment_DD for image_GD, change_GD in zip(image, change, strict=True)]

    def transposed(self, output_TD: Tensor) -> Change:
        """J^T output."""
        rows = []
        for expert, slope_nG in enumerate(self.slopes):
            pulled_nS = output_TD.index_select(0, self.kept.tokens(expert)) @ self.kept.down(expert).float()
            pulled_nG = torch.empty_like(slope_nG)
            for chosen in self.kept.row_sets(expert):
                pulled_nG[:, chosen] = slope_nG[:, chosen] * pulled_nS
            rows.append(pulled_nG.T @ self.kept.x(expert))
        return rows

    def precondition(self, residual: Change) -> Change:
        scaled = zip(residual, self.scales, strict=True)
        return [residual_GD @ self.inverse_DD / (scale_G + self.penalty).clamp(min=1e-30).unsqueeze(1) for residual_GD, scale_G in scaled]

    def _applied(self, change: Change) -> Tensor:
        """J change (T, D)."""
        output_TD = torch.zeros_like(self.kept.inputs.hidden_TD, dtype=torch.float32)
        for expert, (slope_nG, change_GD) in enumerate(zip(self.slopes, change, strict=True)):
            moved_nG = slope_nG * (self.kept.x(expert) @ change_GD.T)
            moved_nS = sum((moved_nG[:, chosen] for chosen in self.kept.row_sets(expert)), start=torch.zeros(()))
            output_TD.index_add_(0, self.kept.tokens(expert), moved_nS @ self.kept.down(expert).float().T)
        return output_TD

    def _scale(self, expert: int) -> Tensor:
        """s of every row (G,)."""
        slope_sq_G = self.slopes[expert].square().sum(0)
        norm_sq_S = self.kept.down(expert).float().square().sum(0)
        for chosen in self.kept.row_sets(expert):
            slope_sq_G[chosen] *= norm_sq_S
        return slope_sq_G


def _dot(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    return float(sum(torch.sum(a * b, dtype=torch.float64) for a, b in zip(one, other, strict=True)))


def _add(one: Change, factor: float, other: Change) -> None:
    """one += factor * other."""
    for a, b in zip(one, other, strict=True):
        a.add_(b, alpha=factor)
