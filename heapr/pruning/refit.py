"""Refit of the remaining rows of W_gate and W_up: one Gauss-Newton step for a layer, by conjugate gradients.

In: pruned experts, their inputs, and what the layer's output lost. Out: a change of the input projections
(docs/method.md, 22 and 23). The target is the layer's output. The model's loss and gradients are not needed.
Shape letters: T tokens, D model width, n tokens of one expert, S atomic experts of one expert, G rows of its
input projection.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from heapr.pruning.activations import Activations
from heapr.ranks import ONE_PROCESS, Ranks

Change = list[Tensor]  # (G, D) for each expert


def refit_inputs(
    kept: Activations, lost_TD: Tensor, *, ridge: float, num_steps: int, ranks: Ranks = ONE_PROCESS
) -> Change:
    """Return the change v of the rows of W_gate and W_up that restores what was lost, to first order:

        min over v of  sum over tokens of ||J v - d||^2 + q sum_r v_r^T M v_r

        J v = sum over experts and rows r of p (dh_k/da_r) (v_r . x) w_k
        M   = mean(x x^T) + ridge * mean(diag) I
        s_r = sum over tokens of (p dh_k/da_r)^2 ||w_k||^2
        q   = ridge * mean(s)

    with a_r the product of row r and x, so that J v is the change of the layer's output. The solution takes
    `num_steps` steps of conjugate gradients, preconditioned by (s_r + q) M. This would be the exact matrix if
    inputs and slopes were independent and rows did not interact.

    Args:
        kept: the pruned experts, applied to the layer's inputs.
        lost_TD: d, what the layer's output lost.
        ridge: above 0.
        num_steps: at least 1.
        ranks: the processes that refit together; sums are over the tokens of all.

    Returns:
        v: (G, D) for each expert, float32.
    """
    problem = _Problem(kept, ridge, ranks)
    residual = problem.transposed(lost_TD)
    change = [torch.zeros_like(rows_GD) for rows_GD in residual]
    direction = problem.precondition(residual)
    size = _dot(residual, direction)
    # Updates are in place, because each of these is as large as W_gate and W_up together.
    for _ in range(num_steps):
        # Nothing was lost, or the solution is exact.
        if ranks.of_first(size <= 0):
            break
        image = problem.normal(direction)
        step = size / _dot(direction, image)
        _add(change, step, direction)
        _add(residual, -step, image)
        del image
        preconditioned = problem.precondition(residual)
        previous = size
        size = _dot(residual, preconditioned)
        _add(preconditioned, size / previous, direction)
        direction = preconditioned
    return change


class _Problem:
    """The linearized layer.

    Attributes:
        kept: the pruned experts, applied to the layer's inputs.
        slopes: p dh_k/da_r (n, G) for each expert.
        scales: s (G,) for each expert.
        moment_DD, inverse_DD: M and its inverse.
        penalty: q.
    """

    def __init__(self, kept: Activations, ridge: float, ranks: Ranks) -> None:
        self.kept = kept
        self._ranks = ranks
        experts = range(len(kept.widths))
        self.slopes = [kept.p(expert) * kept.slopes(expert) for expert in experts]
        self.scales = [self._scale(expert) for expert in experts]
        ranks.sum(self.scales)
        scale_G = torch.cat(self.scales)
        self.penalty = ridge * float(scale_G.mean())
        self.moment_DD = self._moment(ridge)
        inverse_DD = torch.linalg.inv(self.moment_DD.double())
        self.inverse_DD = inverse_DD.float()

    def _moment(self, ridge: float) -> Tensor:
        """M, from the tokens of all ranks."""
        hidden_TD = self.kept.inputs.hidden_TD.float()
        num_tokens = max(1, self._ranks.total(len(hidden_TD)))
        moment_DD = hidden_TD.T @ hidden_TD / num_tokens
        self._ranks.sum([moment_DD])
        diagonal_D = moment_DD.diagonal()
        diagonal_D.add_(ridge * diagonal_D.mean())
        return moment_DD

    def normal(self, change: Change) -> Change:
        """(J^T J + q M) change."""
        output_TD = self._applied(change)
        image = []
        for image_GD, change_GD in zip(self.transposed(output_TD), change, strict=True):
            penalty_GD = self.penalty * change_GD @ self.moment_DD
            image.append(image_GD + penalty_GD)
        return image

    def transposed(self, output_TD: Tensor) -> Change:
        """J^T output."""
        rows = []
        for expert, slope_nG in enumerate(self.slopes):
            token_n = self.kept.tokens(expert)
            output_nD = output_TD.index_select(0, token_n)
            down_DS = self.kept.down(expert).float()
            pulled_nS = output_nD @ down_DS
            pulled_nG = torch.empty_like(slope_nG)
            for chosen in self.kept.row_sets(expert):
                pulled_nG[:, chosen] = slope_nG[:, chosen] * pulled_nS
            rows_GD = pulled_nG.T @ self.kept.x(expert)
            rows.append(rows_GD)
        self._ranks.sum(rows)
        return rows

    def precondition(self, residual: Change) -> Change:
        """(s_r + q)^-1 M^-1 residual."""
        preconditioned = []
        for residual_GD, scale_G in zip(residual, self.scales, strict=True):
            divisor_G = (scale_G + self.penalty).clamp(min=1e-30)
            divisor_G1 = divisor_G.unsqueeze(1)
            solved_GD = residual_GD @ self.inverse_DD
            preconditioned.append(solved_GD / divisor_G1)
        return preconditioned

    def _applied(self, change: Change) -> Tensor:
        """J change (T, D)."""
        output_TD = torch.zeros_like(self.kept.inputs.hidden_TD, dtype=torch.float32)
        for expert, change_GD in enumerate(change):
            projected_nG = self.kept.x(expert) @ change_GD.T
            moved_nG = self.slopes[expert] * projected_nG
            moved_nS = torch.zeros(())
            for chosen in self.kept.row_sets(expert):
                moved_nS = moved_nS + moved_nG[:, chosen]
            down_DS = self.kept.down(expert).float()
            output_nD = moved_nS @ down_DS.T
            token_n = self.kept.tokens(expert)
            output_TD.index_add_(0, token_n, output_nD)
        return output_TD

    def _scale(self, expert: int) -> Tensor:
        """s_r of each row r of an expert (G,)."""
        slope_sq_G = self.slopes[expert].square().sum(0)
        down_DS = self.kept.down(expert).float()
        norm_sq_S = down_DS.square().sum(0)
        for chosen in self.kept.row_sets(expert):
            slope_sq_G[chosen] *= norm_sq_S
        return slope_sq_G


def _dot(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Inner product, added in float64."""
    products = [torch.sum(a * b, dtype=torch.float64) for a, b in zip(one, other, strict=True)]
    return float(sum(products))


def _add(one: Change, factor: float, other: Change) -> None:
    """one += factor * other."""
    for a, b in zip(one, other, strict=True):
        a.add_(b, alpha=factor)
