"""Repair: refit the remaining weights of a layer's experts by least squares (docs/method.md, 18 to 23).

In: the experts of one layer before and after surgery, and their inputs. Out: the experts after surgery,
changed in place.
Shape letters: T tokens, D model width, E experts, n tokens of one expert, S kept atomic experts (of one
expert, or of the layer).
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor

from heapr.errors import ConfigError
from heapr.model.expert_inputs import ExpertInputs
from heapr.model.experts.layout import Experts
from heapr.model.experts.ragged import RaggedExperts
from heapr.model.stream import StreamTarget
from heapr.pruning.activations import Activations, layer_output
from heapr.pruning.layer_repair import LayerRepair, copy_weights, num_changed
from heapr.pruning.least_squares import mean_of, solve, solve_by_steps, solve_directly, squared
from heapr.pruning.refit import refit_inputs
from heapr.ranks import ONE_PROCESS, Ranks

STEP_SIZES = (1.0, 0.5, 0.25)  # of a Gauss-Newton step, tried in this order


class ExpertRepair:
    """Each expert is refit to reproduce its own output.

    With h the activations of the expert's S kept atomic experts, d = E(x) - E'(x) what its output lost, u =
    p^2 (or 1), and sums over its n calibration tokens:

        C = sum u h h^T  (S, S)
        B = sum u h d^T  (S, D)
        r = ridge * (1 + S/n) * mean(diag C)
        W' = W + [(C + r I)^-1 B]^T                                                         (18)

    This minimizes sum u ||W' h - W_down h_all||^2 + r ||W' - W||^2. The ridge pulls toward the present
    columns, so the error on the calibration tokens cannot rise, and an expert with few tokens changes little.
    If rounding to the model's dtype would raise an expert's error, its columns are left unchanged.

    Args:
        ridge: above 0.
        router_weighted: whether tokens are weighted by the square of their router weight.
        sequential: whether inputs are measured with the layers before already pruned and repaired.
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
        ranks: Ranks = ONE_PROCESS,
    ) -> LayerRepair:
        assert target is None, "each expert is refit to its own output"
        old = Activations(before, inputs)
        new = Activations(after, inputs)
        error = change = 0.0
        num_repaired = 0
        for expert in range(len(after.widths)):
            lost_nD = old.output(expert) - new.output(expert)
            u_n1 = self._token_weights(new, expert)
            lost_sq_nD = u_n1 * lost_nD.square()
            error += float(lost_sq_nD.sum(dtype=torch.float64))
            down_DS = new.down(expert)
            repaired_DS, expert_change = self._solve(new.h(expert), down_DS, lost_nD, u_n1, ranks=ranks)
            if expert_change < 0:
                change += expert_change
                num_repaired += 1
                # Other experts' activations do not depend on these columns.
                down_DS.copy_(repaired_DS)
        num_tokens = ranks.total(len(inputs.hidden_TD))
        error = ranks.total(error)
        error_after = max(0.0, error + change)
        return LayerRepair(error / num_tokens, error_after / num_tokens, num_repaired)

    def _token_weights(self, new: Activations, expert: int) -> Tensor:
        """u of each token of an expert (n, 1)."""
        p_n1 = new.p(expert)
        if self.router_weighted:
            return p_n1.square()
        return torch.ones_like(p_n1)

    def _solve(
        self, h_nS: Tensor, down_DS: Tensor, lost_nD: Tensor, u_n1: Tensor, *, ranks: Ranks
    ) -> tuple[Tensor, float]:
        """Return new columns of one expert in the model's dtype, and the change of its squared error:

        sum u ||d - V^T h||^2 - sum u ||d||^2 = tr(V^T C V) - 2 tr(V^T B),   V = (W' - W)^T
        """
        weighted_nS = u_n1 * h_nS
        C_SS = (h_nS.T @ weighted_nS).double()
        weighted_nD = u_n1 * lost_nD
        B_SD = (h_nS.T @ weighted_nD).double()
        num_tokens = torch.tensor(len(h_nS), dtype=torch.float64)
        ranks.sum([C_SS, B_SD, num_tokens])
        width = h_nS.shape[1]
        n = max(1.0, float(num_tokens))
        share = width / n
        ridge = self.ridge * (1 + share) * mean_of([C_SS.diagonal()])
        change_SD = solve(C_SS, B_SD, ridge)
        repaired_DS = (down_DS.double() + change_SD.T).to(down_DS.dtype)  # (18)
        # After rounding.
        change_SD = (repaired_DS.double() - down_DS.double()).T
        slope_SD = C_SS @ change_SD - 2 * B_SD
        error_change = (change_SD * slope_SD).sum()
        return repaired_DS, float(error_change)


class JointRepair:
    """All experts of a layer are refit together to reproduce the layer's output.

    Experts thereby compensate for each other's losses. With z the S kept activations of all experts times
    their router weights (zero for experts that a token was not routed to), d = y - y' what the layer's output
    lost, and sums over the T calibration tokens:

        A = sum z z^T  (S, S)
        B = sum z d^T  (S, D)
        r = ridge * mean(diag A)
        W' = W + [(A + r I)^-1 B]^T                                                         (19)

    This minimizes sum ||W' z - W z_all||^2 + r ||W' - W||^2. Up to S = `direct_up_to`, A is formed and
    factored in float64. For larger layers, conjugate gradients solve the equations without forming A
    (`solve_by_steps`) and stop when the error is provably within `tolerance` of its minimum. They hold one
    square matrix per expert, of its width, four matrices (S, D) and the residual (T, D).

    With `target="residual_stream"`, the remaining weights are refit so that the residual stream s after the
    layer matches the stream before this pruning. A layer then also compensates for the losses of earlier
    layers. Tokens are weighted by 1 / mean(s^2) (docs/method.md, 21).

    With `refits` above 0, the remaining rows of W_gate and W_up change too. Each refit is a Gauss-Newton
    step, computed by `refit_steps` steps of conjugate gradients (`refit_inputs`). It is shortened or dropped
    if the error does not fall. After each refit, the columns are solved for again.

    Args:
        ridge: above 0.
        target: "layer_output" or "residual_stream".
        refits: number of refits. 0 leaves W_gate and W_up as they are.
        refit_steps: steps of conjugate gradients in each refit, at least 1.
        direct_up_to: largest S for which the normal equations are formed and factored.
        tolerance: how far the error may be above its minimum, as a share of the error, in (0, 1).
        max_steps: limit on the steps of conjugate gradients that solve for columns, at least 1.
        sequential: whether inputs are measured with the layers before already pruned and repaired.

    Raises:
        ConfigError: `target="residual_stream"` without `sequential`.
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
        ranks: Ranks = ONE_PROCESS,
    ) -> LayerRepair:
        old = copy_weights(after, with_inputs=self.refits_inputs)
        num_tokens = ranks.total(len(inputs.hidden_TD))
        if target is None:
            wanted_TD = layer_output(before, inputs)
        else:
            inputs = inputs.weighted(target.weight_T)
            wanted_TD = target.output_TD * target.weight_T.unsqueeze(1)
        lost_TD = wanted_TD - layer_output(after, inputs)
        error_before = ranks.total(squared(lost_TD))
        lost_TD = self._solve_columns(after, inputs, wanted_TD, lost_TD, ranks=ranks)
        for _ in range(self.refits if error_before > 0 else 0):
            lost_TD = self._refit_inputs(after, inputs, wanted_TD, lost_TD, ranks=ranks)
            lost_TD = self._solve_columns(after, inputs, wanted_TD, lost_TD, ranks=ranks)
        error_after = ranks.total(squared(lost_TD))
        num_repaired = num_changed(after, old, with_inputs=self.refits_inputs)
        return LayerRepair(error_before / num_tokens, error_after / num_tokens, num_repaired)

    def _solve_columns(
        self,
        after: RaggedExperts,
        inputs: ExpertInputs,
        wanted_TD: Tensor,
        lost_TD: Tensor,
        *,
        ranks: Ranks,
    ) -> Tensor:
        """Solve for new columns, and keep them if they lower the error in the model's dtype.

        Returns:
            what the layer's output lacks then.
        """
        kept = Activations(after, inputs)
        old_SD = after.down_proj.detach().clone()
        if sum(after.widths) <= self.direct_up_to:
            change_SD = solve_directly(kept, lost_TD, ridge=self.ridge, ranks=ranks)
        else:
            change_SD = self._stepwise(kept, lost_TD, ranks)
        # In float64, and in place because it is the layer's largest tensor.
        new_SD = change_SD.add_(old_SD)
        after.down_proj.copy_(new_SD)
        new_lost_TD = wanted_TD - layer_output(after, inputs)
        return _accept(after.down_proj, old_SD, new_lost_TD, lost_TD, ranks=ranks)

    def _refit_inputs(
        self,
        after: RaggedExperts,
        inputs: ExpertInputs,
        wanted_TD: Tensor,
        lost_TD: Tensor,
        *,
        ranks: Ranks,
    ) -> Tensor:
        """Change the rows of W_gate and W_up by one Gauss-Newton step, if a step size lowers the error.

        Returns:
            what the layer's output lacks then.
        """
        projection = after.get_parameter(after.layout.input_name)
        old_GD = projection.detach().clone()
        kept = Activations(after, inputs)
        changes = refit_inputs(kept, lost_TD, ridge=self.ridge, num_steps=self.refit_steps, ranks=ranks)
        change_GD = torch.cat(changes)
        del changes
        for step_size in STEP_SIZES:
            projection.copy_(old_GD.double().add_(change_GD, alpha=step_size))
            new_lost_TD = wanted_TD - layer_output(after, inputs)
            reached_TD = _accept(projection, old_GD, new_lost_TD, lost_TD, ranks=ranks)
            if reached_TD is not lost_TD:
                return reached_TD
        return lost_TD

    def _stepwise(self, kept: Activations, lost_TD: Tensor, ranks: Ranks) -> Tensor:
        """Change of the columns (S, D), without forming the normal equations."""
        return solve_by_steps(
            kept,
            lost_TD,
            ridge=self.ridge,
            tolerance=self.tolerance,
            max_steps=self.max_steps,
            ranks=ranks,
        )


def _accept(parameter: Tensor, old: Tensor, reached_TD: Tensor, lost_TD: Tensor, *, ranks: Ranks) -> Tensor:
    """Undo a change of a parameter unless it lowers the error.

    Args:
        parameter: already changed.
        old: its values before.
        reached_TD: what the layer's output lacks with the change.
        lost_TD: the same without.

    Returns:
        one of the latter two.
    """
    if ranks.total(squared(reached_TD)) < ranks.total(squared(lost_TD)):
        return reached_TD
    parameter.copy_(old)
    return lost_TD
