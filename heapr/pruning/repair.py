"""Repair: the kept weights of a layer's experts are refit by least squares to make up for what was removed.

In: the experts of one layer before and after surgery, and their inputs. Out: the latter experts, changed in
place. docs/method.md, 18 to 23.
Shape letters: T tokens, D model width, E experts, n tokens of one expert, S kept atomic experts (of one
expert, or of the layer).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor

from heapr.errors import ConfigError
from heapr.model.expert_inputs import ExpertInputs
from heapr.model.experts.layout import Experts, matrices_of
from heapr.model.experts.ragged import RaggedExperts
from heapr.model.stream import StreamTarget
from heapr.pruning.activations import Activations, layer_output
from heapr.pruning.layer_repair import LayerRepair
from heapr.pruning.least_squares import mean_of, solve, solve_by_steps, squared
from heapr.pruning.refit import refit_inputs

STEP_SIZES = (1.0, 0.5, 0.25)  # of a Gauss-Newton step, tried in turn
ROWS = 128  # of the layer's normal equations, computed at once


class ExpertRepair:
    """Each expert makes up for its own loss.

    With h the activations of the expert's kept atomic experts, d = E(x) - E'(x) what it lost, u = p^2 (or 1),
    and sums over its n calibration tokens:

        C = sum u h h^T  (S, S)
        B = sum u h d^T  (S, D)
        r = ridge * (1 + S/n) * mean(diag C)
        W' = W + [(C + r I)^-1 B]^T                                                         (18)

    This minimizes sum u ||W' h - W_down h_all||^2 + r ||W' - W||^2. The ridge draws toward the present
    columns, so the error on the calibration tokens cannot rise, and an expert with few tokens stays nearly as
    it is. If rounding to the model's dtype would raise an expert's error, its columns are left unchanged.

    Args:
        ridge: above 0.
        router_weighted: whether tokens count by the square of their router weight.
        sequential: whether inputs are measured behind the layers already pruned and repaired.
    """

    refits_inputs = False
    follows_stream = False

    def __init__(
        self, ridge: Annotated[float, Gt(0)] = 1e-2, router_weighted: bool = True, sequential: bool = True
    ) -> None:
        self.ridge = ridge
        self.router_weighted = router_weighted
        self.is_sequential = sequential

    def __call__(
        self,
        before: Experts,
        after: RaggedExperts,
        inputs: ExpertInputs,
        *,
        target: StreamTarget | None = None,
    ) -> LayerRepair:
        assert target is None, "an expert has an output of its own to go by"
        old = Activations(before, inputs)
        new = Activations(after, inputs)
        error = change = 0.0
        num_repaired = 0
        columns = []
        for expert in range(len(after.widths)):
            lost_nD = old.output(expert) - new.output(expert)
            u_n1 = new.p(expert).square() if self.router_weighted else torch.ones_like(new.p(expert))
            error += float((u_n1 * lost_nD.square()).sum(dtype=torch.float64))
            repaired_DS, gain = self._solve(new.h(expert), new.down(expert), lost_nD, u_n1)
            if gain < 0:
                change += gain
                num_repaired += 1
            columns.append(repaired_DS if gain < 0 else new.down(expert))
        after.down_proj.copy_(torch.cat(columns, dim=1).T)
        num_tokens = len(inputs.hidden_TD)
        return LayerRepair(error / num_tokens, max(0.0, error + change) / num_tokens, num_repaired)

    def _solve(self, h_nS: Tensor, down_DS: Tensor, lost_nD: Tensor, u_n1: Tensor) -> tuple[Tensor, float]:
        """New columns of one expert in the model's dtype, and by how much they change its squared error:

        sum u ||d - V^T h||^2 - sum u ||d||^2 = tr(V^T C V) - 2 tr(V^T B),   V = (W' - W)^T
        """
        C_SS = (h_nS.T @ (u_n1 * h_nS)).double()
        B_SD = (h_nS.T @ (u_n1 * lost_nD)).double()
        num_tokens, width = h_nS.shape
        ridge = self.ridge * (1 + width / max(1, num_tokens)) * mean_of([C_SS.diagonal()])
        repaired_DS = (down_DS.double() + solve(C_SS, B_SD, ridge).T).to(down_DS.dtype)  # (18)
        change_SD = (repaired_DS.double() - down_DS.double()).T
        gain = (change_SD * (C_SS @ change_SD - 2 * B_SD)).sum()
        return repaired_DS, float(gain)


class JointRepair:
    """All experts of a layer together make up for the layer's loss, and so for each other's.

    With z the kept activations of all experts times their router weights, S of them and zero for experts that
    a token was not routed to, d = y - y' what the layer's output lost, and sums over the T calibration
    tokens:

        A = sum z z^T  (S, S)
        B = sum z d^T  (S, D)
        r = ridge * mean(diag A)
        W' = W + [(A + r I)^-1 B]^T                                                         (19)

    This minimizes sum ||W' z - W z_all||^2 + r ||W' - W||^2. Up to S = `direct_up_to`, A is formed and
    factored in float64. Above, conjugate gradients solve the equations without forming A (`solve_by_steps`),
    and end when the error is known to be within `tolerance` of its minimum. Memory is then that of the
    experts' blocks, E matrices of their widths squared, of four matrices (S, D) and of the residual (T, D).

    With `target="residual_stream"`, y is what brings the residual stream s behind the layer back to where it
    was before this pruning, so a layer makes up for the losses of earlier layers too. Tokens then count by 1
    / mean(s^2) (docs/method.md, 21).

    With `refits` above 0, the remaining rows of W_gate and W_up change too. Each refit is a Gauss-Newton
    step, computed by `refit_steps` steps of conjugate gradients (`refit_inputs`) and shortened or dropped if
    the error does not fall; then the columns are solved for once more.

    Args:
        ridge: above 0.
        target: "layer_output" or "residual_stream".
        refits: how many. 0 leaves W_gate and W_up as they are.
        refit_steps: of conjugate gradients in each, at least 1.
        direct_up_to: kept atomic experts of a layer up to which the normal equations are formed and factored.
        tolerance: how far the error may be above its minimum, as a share of it, in (0, 1).
        max_steps: upper limit of these conjugate gradients, at least 1.
        sequential: whether inputs are measured behind the layers already pruned and repaired.

    Raises:
        ConfigError: the residual stream as target without `sequential`.
    """

    def __init__(  # noqa: PLR0913 - one for each option
        self,
        ridge: Annotated[float, Gt(0)] = 1e-2,
        *,
        target: Literal["layer_output", "residual_stream"] = "layer_output",
        refits: Annotated[int, Ge(0)] = 0,
        refit_steps: Annotated[int, Ge(1)] = 10,
        direct_up_to: Annotated[int, Ge(0)] = 8192,
        tolerance: Annotated[float, Gt(0), Lt(1)] = 1e-3,
        max_steps: Annotated[int, Ge(1)] = 100,
        sequential: bool = True,
    ) -> None:
        self.ridge = ridge
        if target == "residual_stream" and not sequential:
            needed = "pruning.repair.target=residual_stream needs pruning.repair.sequential=true"
            raise ConfigError(f"{needed}: in the unpruned model no layer has changed")
        self.follows_stream = target == "residual_stream"
        self.refits = refits
        self.refit_steps = refit_steps
        self.direct_up_to = direct_up_to
        self.tolerance = tolerance
        self.max_steps = max_steps
        self.is_sequential = sequential
        self.refits_inputs = refits > 0

    def __call__(
        self,
        before: Experts,
        after: RaggedExperts,
        inputs: ExpertInputs,
        *,
        target: StreamTarget | None = None,
    ) -> LayerRepair:
        old = _weights(after)
        num_tokens = len(inputs.hidden_TD)
        if target is None:
            wanted_TD = layer_output(before, inputs)
        else:
            inputs = inputs.weighted(target.weight_T)
            wanted_TD = target.output_TD * target.weight_T.unsqueeze(1)
        lost_TD = wanted_TD - layer_output(after, inputs)
        error_before = squared(lost_TD)
        lost_TD = self._solve_columns(after, inputs, wanted_TD, lost_TD)
        for _ in range(self.refits if error_before > 0 else 0):
            lost_TD = self._refit_inputs(after, inputs, wanted_TD, lost_TD)
            lost_TD = self._solve_columns(after, inputs, wanted_TD, lost_TD)
        error_after = squared(lost_TD)
        return LayerRepair(error_before / num_tokens, error_after / num_tokens, _num_changed(after, old))

    def _solve_columns(
        self,
        after: RaggedExperts,
        inputs: ExpertInputs,
        wanted_TD: Tensor,
        lost_TD: Tensor,
    ) -> Tensor:
        """New columns, unless they are no better once rounded to the model's dtype; returns what is lost
        then."""
        way = self._direct if sum(after.widths) <= self.direct_up_to else self._stepwise
        old_SD = after.down_proj.detach().clone()
        change_SD = way(Activations(after, inputs), lost_TD)
        new_SD = change_SD.add_(old_SD)  # in float64 and in place: it is the layer's largest tensor
        after.down_proj.copy_(new_SD)
        new_lost_TD = wanted_TD - layer_output(after, inputs)
        return _accept(after.down_proj, old_SD, new_lost_TD, lost_TD)

    def _refit_inputs(
        self,
        after: RaggedExperts,
        inputs: ExpertInputs,
        wanted_TD: Tensor,
        lost_TD: Tensor,
    ) -> Tensor:
        """New rows of W_gate and W_up, if a step in the direction that is best to first order lowers the
        error; returns what is lost then."""
        projection = after.get_parameter(after.layout.input_name)
        old_GD = projection.detach().clone()
        kept = Activations(after, inputs)
        changes = refit_inputs(kept, lost_TD, ridge=self.ridge, num_steps=self.refit_steps)
        change_GD = torch.cat(changes)
        del changes
        for step_size in STEP_SIZES:
            projection.copy_(old_GD.double().add_(change_GD, alpha=step_size))
            new_lost_TD = wanted_TD - layer_output(after, inputs)
            reached_TD = _accept(projection, old_GD, new_lost_TD, lost_TD)
            if reached_TD is not lost_TD:
                return reached_TD
        return lost_TD

    def _direct(self, kept: Activations, lost_TD: Tensor) -> Tensor:
        """Change of the columns (S, D), from the normal equations of the whole layer."""
        size = sum(kept.widths)
        A_SS = torch.zeros(size, size, dtype=torch.float64, device=lost_TD.device)
        B_SD = torch.zeros(size, lost_TD.shape[1], dtype=torch.float64, device=lost_TD.device)
        for chunk, z_tS in kept.chunks_of_z():  # products of a chunk in float32, their sum in float64
            for first in range(0, size, ROWS):  # the lower triangle, which is all that Cholesky reads
                last = min(first + ROWS, size)
                A_SS[first:last, :last] += z_tS[:, first:last].T @ z_tS[:, :last]
            B_SD += z_tS.T @ lost_TD[chunk]
        return solve(A_SS, B_SD, self.ridge * mean_of([A_SS.diagonal()]))

    def _stepwise(self, kept: Activations, lost_TD: Tensor) -> Tensor:
        """The same without forming these equations."""
        return solve_by_steps(
            kept,
            lost_TD,
            ridge=self.ridge,
            tolerance=self.tolerance,
            max_steps=self.max_steps,
        )


def _accept(parameter: Tensor, old: Tensor, reached_TD: Tensor, lost_TD: Tensor) -> Tensor:
    """Undo a change unless less is lost with it; returns what is lost then."""
    if squared(reached_TD) < squared(lost_TD):
        return reached_TD
    parameter.copy_(old)
    return lost_TD


def _weights(experts: Experts) -> list[tuple[Tensor, Tensor]]:
    """A copy of every expert's rows of W_gate and W_up, and columns of W_down."""
    copies = []
    for matrices in matrices_of(experts):
        inputs_GD = matrices.inputs_GD.detach().clone()
        down_DF = matrices.down_DF.detach().clone()
        copies.append((inputs_GD, down_DF))
    return copies


def _num_changed(experts: Experts, old: Sequence[tuple[Tensor, Tensor]]) -> int:
    """Experts with at least one weight that changed."""
    num_changed = 0
    for (inputs_GD, down_DF), (old_GD, old_DF) in zip(_weights(experts), old, strict=True):
        is_same = torch.equal(inputs_GD, old_GD) and torch.equal(down_DF, old_DF)
        num_changed += not is_same
    return num_changed
