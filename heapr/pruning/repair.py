"""Repair: least squares for what is left of a layer's experts, so that it makes up for what was removed.

In: the experts of one layer before and after surgery, and what flows into them. Out: the latter, changed. docs/method.md, 18 to 23.
Shape letters: T tokens, D model width, E experts, n tokens of one expert, S kept atomic experts (of one expert, or of the layer).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from heapr.errors import ConfigError
from heapr.model.expert_inputs import ExpertInputs
from heapr.model.experts.layout import Experts, matrices_of
from heapr.model.experts.ragged import RaggedExperts
from heapr.model.stream import StreamTarget
from heapr.pruning.activations import Activations, layer_output
from heapr.pruning.least_squares import mean_of, solve, solve_by_steps, squared
from heapr.pruning.refit import refit_inputs

TARGETS = ("layer_output", "residual_stream")
STEP_SIZES = (1.0, 0.5, 0.25)  # of a Gauss-Newton step, tried in turn
ROWS = 128  # of the layer's normal equations, made at once


@dataclass(frozen=True)
class LayerRepair:
    """What a repair found for one layer.

    Attributes:
        error_before, error_after: what is minimised, without ridge and per token, before and after; never larger after.
        num_repaired: experts whose weights changed.
    """

    error_before: float
    error_after: float
    num_repaired: int


def report_repair(found: Mapping[int, LayerRepair]) -> dict[str, Any]:
    """Errors per token before and after, by decoder layer index; JSON types only."""
    before, after = (sum(getattr(layer, name) for layer in found.values()) for name in ("error_before", "error_after"))
    summary = f"repair leaves {after / before:.1%} of the layers' squared error" if before > 0 else "nothing was lost, nothing repaired"
    return {
        "layers": {
            str(index): {"error_before": layer.error_before, "error_after": layer.error_after, "num_repaired": layer.num_repaired}
            for index, layer in found.items()
        },
        "summary": [summary],
        "not_reached": [],
    }


class Repair(Protocol):
    """A way to repair."""

    is_sequential: bool  # inputs are measured behind the layers already pruned and repaired; else in the model as it was
    refits_inputs: bool  # changes W_gate and W_up too, not W_down alone
    follows_stream: bool  # makes up for what earlier layers changed too

    def __call__(self, before: Experts, after: RaggedExperts, inputs: ExpertInputs, *, target: StreamTarget | None = None) -> LayerRepair:
        """Change what is left of one layer's experts, in place.

        Args:
            target: what they are to put out in all; none is what they put out before.
        """
        ...


class ExpertRepair:
    """Every expert by itself makes up for its own loss.

    With h the activations of the expert's kept atomic experts, d = E(x) - E'(x) what it lost, u = p^2 (or 1), sums over its n
    calibration tokens:

        C = sum u h h^T  (S, S),   B = sum u h d^T  (S, D),   W' = W + [(C + r I)^-1 B]^T,   r = ridge * (1 + S/n) * mean(diag C)

    It is the minimum of sum u ||W' h - W_down h_all||^2 + r ||W' - W||^2: ridge draws towards the columns as they are, so that the
    error on the calibration tokens cannot rise and an expert with few tokens stays as it is. Experts whose error
    would rise by rounding to the model's dtype keep their columns.

    Args:
        ridge: above 0.
        router_weighted: tokens count by the square of their router weight.
        sequential: measured behind the layers already pruned and repaired.

    Raises:
        ConfigError: a ridge that is not above 0.
    """

    refits_inputs = False
    follows_stream = False

    def __init__(self, ridge: float = 1e-2, router_weighted: bool = True, sequential: bool = True) -> None:
        self.ridge = _check_ridge(ridge)
        self.router_weighted = router_weighted
        self.is_sequential = sequential

    def __call__(self, before: Experts, after: RaggedExperts, inputs: ExpertInputs, *, target: StreamTarget | None = None) -> LayerRepair:
        assert target is None, "an expert has an output of its own to go by"
        old, new = Activations(before, inputs), Activations(after, inputs)
        error, change, num_repaired, columns = 0.0, 0.0, 0, []
        for expert, width in enumerate(after.widths):
            h_nS, down_DS = new.h(expert), new.down(expert)
            lost_nD = old.output(expert) - new.output(expert)
            weight_n1 = new.p(expert).square() if self.router_weighted else torch.ones_like(new.p(expert))
            C_SS, B_SD = (h_nS.T @ (weight_n1 * h_nS)).double(), (h_nS.T @ (weight_n1 * lost_nD)).double()
            ridge = self.ridge * (1 + width / max(1, len(h_nS))) * mean_of([C_SS.diagonal()])
            repaired_DS = (down_DS.double() + solve(C_SS, B_SD, ridge).T).to(down_DS.dtype)
            change_SD = (repaired_DS.double() - down_DS.double()).T
            gain = float((change_SD * (C_SS @ change_SD - 2 * B_SD)).sum())  # sum u ||d - c h||^2 - sum u ||d||^2, with change c
            error += float((weight_n1 * lost_nD.square()).sum(dtype=torch.float64))
            if gain < 0:
                change, num_repaired = change + gain, num_repaired + 1
            columns.append(repaired_DS if gain < 0 else down_DS)
        after.down_proj.copy_(torch.cat(columns, dim=1).T)
        num_tokens = len(inputs.hidden_TD)
        return LayerRepair(error / num_tokens, max(0.0, error + change) / num_tokens, num_repaired)


class JointRepair:
    """All experts of a layer together make up for the layer's loss, and so for each other's.

    With z the kept activations of all experts times their router weights, zero for experts that a token was not routed to (S long),
    and d = y - y' what the layer's output lost, sums over the T calibration tokens:

        A = sum z z^T  (S, S),   B = sum z d^T  (S, D),   W' = W + [(A + r I)^-1 B]^T,   r = ridge * mean(diag A)

    It is the minimum of sum ||W' z - W z_all||^2 + r ||W' - W||^2. Up to `direct_up_to` unknowns per output, A is made and
    factored in float64. Above, conjugate gradients never make it (`solve_by_steps`): they end when the error is known to be within
    `tolerance` of its minimum. Memory is then that of the experts' blocks, E matrices of their widths squared, of four matrices
    (S, D) and of the residual (T, D).

    With `target="residual_stream"`, y is what brings the residual stream s behind the layer to where it was before this pruning, so that
    a layer makes up for what the earlier ones lost too; tokens then count by 1 / mean(s^2) (docs/method.md, 21).

    With `refits` above 0, the rows of W_gate and W_up that are left move too: so many times, a Gauss-Newton step of `refit_steps` steps
    of conjugate gradients (`refit_inputs`), shortened or dropped if the error does not fall, after which the columns are solved for
    once more.

    Args:
        ridge: above 0.
        target: "layer_output" or "residual_stream".
        refits: 0 leaves W_gate and W_up as they are.
        refit_steps: of conjugate gradients in each, at least 1.
        direct_up_to: kept atomic experts of a layer up to which the normal equations are made and factored.
        tolerance: share of what is minimised that it may be above its minimum, in (0, 1).
        max_steps: of these conjugate gradients at the most, at least 1.
        sequential: measured behind the layers already pruned and repaired.

    Raises:
        ConfigError: a value out of range, an unknown target, or the residual stream as target of a repair that is not sequential.
    """

    def __init__(  # noqa: PLR0913 - one for each option
        self,
        ridge: float = 1e-2,
        *,
        target: str = "layer_output",
        refits: int = 0,
        refit_steps: int = 10,
        direct_up_to: int = 8192,
        tolerance: float = 1e-3,
        max_steps: int = 100,
        sequential: bool = True,
    ) -> None:
        self.ridge = _check_ridge(ridge)
        if min(refits, direct_up_to) < 0 or min(refit_steps, max_steps) < 1:
            raise ConfigError(
                f"pruning.repair: refits={refits}, direct_up_to={direct_up_to}, refit_steps={refit_steps}, max_steps={max_steps}; "
                "give at least 0 for the first two and 1 for the others"
            )
        if not 0 < tolerance < 1:
            raise ConfigError(f"pruning.repair.tolerance={tolerance} is not in (0, 1); give the share of the error, for example 0.001")
        if target not in TARGETS:
            raise ConfigError(f"pruning.repair.target={target} is unknown; choose one of {', '.join(TARGETS)}")
        if target == "residual_stream" and not sequential:
            raise ConfigError(
                "pruning.repair.target=residual_stream needs pruning.repair.sequential=true: in the model as it was no layer has changed"
            )
        self.follows_stream = target == "residual_stream"
        self.refits = refits
        self.refit_steps = refit_steps
        self.direct_up_to = direct_up_to
        self.tolerance = tolerance
        self.max_steps = max_steps
        self.is_sequential = sequential
        self.refits_inputs = refits > 0

    def __call__(self, before: Experts, after: RaggedExperts, inputs: ExpertInputs, *, target: StreamTarget | None = None) -> LayerRepair:
        old, num_tokens = _weights(after), len(inputs.hidden_TD)
        if target is None:
            wanted_TD = layer_output(before, inputs)
        else:
            inputs, wanted_TD = inputs.weighted(target.weight_T), target.output_TD * target.weight_T.unsqueeze(1)
        lost_TD = wanted_TD - layer_output(after, inputs)
        error_before = squared(lost_TD)
        lost_TD = self._solve_columns(after, inputs, wanted_TD, lost_TD)
        for _ in range(self.refits if error_before > 0 else 0):
            lost_TD = self._refit_inputs(after, inputs, wanted_TD, lost_TD)
            lost_TD = self._solve_columns(after, inputs, wanted_TD, lost_TD)
        return LayerRepair(error_before / num_tokens, squared(lost_TD) / num_tokens, _num_changed(after, old))

    def _solve_columns(self, after: RaggedExperts, inputs: ExpertInputs, wanted_TD: Tensor, lost_TD: Tensor) -> Tensor:
        """New columns, unless they are no better once rounded to the model's dtype; what is lost then."""
        way = self._direct if sum(after.widths) <= self.direct_up_to else self._stepwise
        old_SD = after.down_proj.detach().clone()
        change_SD = way(Activations(after, inputs), lost_TD)
        after.down_proj.copy_(change_SD.add_(old_SD))  # in float64 and in place: it is the layer's largest tensor
        return _accept(after.down_proj, old_SD, wanted_TD - layer_output(after, inputs), lost_TD)

    def _refit_inputs(self, after: RaggedExperts, inputs: ExpertInputs, wanted_TD: Tensor, lost_TD: Tensor) -> Tensor:
        """New rows of W_gate and W_up, if a step in the direction that is best to first order lowers the error; what is lost then."""
        projection = after.get_parameter(after.layout.input_name)
        old_GD = projection.detach().clone()
        change_GD = torch.cat(refit_inputs(Activations(after, inputs), lost_TD, ridge=self.ridge, num_steps=self.refit_steps))
        for step_size in STEP_SIZES:
            projection.copy_(old_GD.double().add_(change_GD, alpha=step_size))
            reached_TD = _accept(projection, old_GD, wanted_TD - layer_output(after, inputs), lost_TD)
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
        """The same without making these equations."""
        return solve_by_steps(kept, lost_TD, ridge=self.ridge, tolerance=self.tolerance, max_steps=self.max_steps)


def _accept(parameter: Tensor, old: Tensor, reached_TD: Tensor, lost_TD: Tensor) -> Tensor:
    """Take a change back unless less is lost with it; what is lost then."""
    if squared(reached_TD) < squared(lost_TD):
        return reached_TD
    parameter.copy_(old)
    return lost_TD


def _weights(experts: Experts) -> list[tuple[Tensor, Tensor]]:
    """A copy of every expert's rows of W_gate and W_up, and columns of W_down."""
    return [(matrices.inputs_GD.detach().clone(), matrices.down_DF.detach().clone()) for matrices in matrices_of(experts)]


def _num_changed(experts: Experts, old: Sequence[tuple[Tensor, Tensor]]) -> int:
    """Experts of which some weight is not what it was."""
    return sum(not all(map(torch.equal, new, was)) for new, was in zip(_weights(experts), old, strict=True))


def _check_ridge(ridge: float) -> float:
    if not 0 < ridge < float("inf"):
        raise ConfigError(f"pruning.repair.ridge={ridge} is not above 0; give for example 0.01")
    return ridge
