"""Repair: least squares for the columns w_k that are left, so that they make up for those that were removed.

In: the experts of one layer before and after surgery, and what flows into them. Out: new columns. docs/method.md, 7.
Shape letters: T tokens, D model width, E experts, n tokens of one expert, S kept atomic experts (of one expert, or of the layer).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from heapr.errors import ConfigError
from heapr.model.layerwise import ExpertInputs
from heapr.model.ragged_experts import Experts, RaggedExperts, activation_of, matrices_of, widths_of

CHUNK = 8192  # tokens whose activations of all experts are held at once


@dataclass(frozen=True)
class LayerRepair:
    """What a repair found for one layer.

    Attributes:
        down_SD: new rows w_k of all kept atomic experts, in the order of `RaggedExperts.down_proj`, of its dtype.
        error_before, error_after: what is minimised, without ridge and per token, before and after; never larger after.
        num_repaired: experts whose columns changed.
    """

    down_SD: Tensor
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
    }


class Repair(Protocol):
    """A way to repair."""

    is_sequential: bool  # inputs are measured behind the layers already pruned and repaired; else in the model as it was

    def __call__(self, before: Experts, after: RaggedExperts, inputs: ExpertInputs) -> LayerRepair:
        """New columns of one layer; changes nothing."""
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

    def __init__(self, ridge: float = 1e-2, router_weighted: bool = True, sequential: bool = True) -> None:
        self.ridge = _check_ridge(ridge)
        self.router_weighted = router_weighted
        self.is_sequential = sequential

    def __call__(self, before: Experts, after: RaggedExperts, inputs: ExpertInputs) -> LayerRepair:
        old, new = Activations(before, inputs), Activations(after, inputs)
        error, change, num_repaired, columns = 0.0, 0.0, 0, []
        for expert, width in enumerate(after.widths):
            h_nS, down_DS = new.h(expert), new.down(expert)
            lost_nD = old.output(expert) - new.output(expert)
            weight_n1 = new.p(expert).square() if self.router_weighted else torch.ones_like(new.p(expert))
            C_SS, B_SD = (h_nS.T @ (weight_n1 * h_nS)).double(), (h_nS.T @ (weight_n1 * lost_nD)).double()
            ridge = self.ridge * (1 + width / max(1, len(h_nS))) * _mean([C_SS.diagonal()])
            repaired_DS = _rounded(down_DS, _solve(C_SS, B_SD, ridge).T)
            change_SD = (repaired_DS.double() - down_DS.double()).T
            gain = float((change_SD * (C_SS @ change_SD - 2 * B_SD)).sum())  # sum u ||d - c h||^2 - sum u ||d||^2, with change c
            error += float((weight_n1 * lost_nD.square()).sum(dtype=torch.float64))
            if gain < 0:
                change, num_repaired = change + gain, num_repaired + 1
            columns.append(repaired_DS if gain < 0 else down_DS)
        down_SD = torch.cat(columns, dim=1).T.contiguous()
        num_tokens = len(inputs.hidden_TD)
        return LayerRepair(down_SD, error / num_tokens, max(0.0, error + change) / num_tokens, num_repaired)


class JointRepair:
    """All experts of a layer together make up for the layer's loss, and so for each other's.

    With z the kept activations of all experts times their router weights, zero for experts that a token was not routed to (S long),
    and d = y - y' what the layer's output lost, sums over the T calibration tokens:

        A = sum z z^T  (S, S),   B = sum z d^T  (S, D),   W' = W + [(A + r I)^-1 B]^T,   r = ridge * mean(diag A)

    It is the minimum of sum ||W' z - W z_all||^2 + r ||W' - W||^2. Up to `direct_up_to` unknowns per output, A is made and
    factored in float64. Above, block coordinate descent over experts never makes it: each expert in turn solves its own block
    against the layer's current residual, `num_sweeps` times; the error never rises. Memory is then that of the
    experts' blocks, E matrices of their widths squared, and of the residual (T, D).

    Args:
        ridge: above 0.
        direct_up_to: kept atomic experts of a layer up to which the normal equations are solved as a whole.
        num_sweeps: of block coordinate descent, at least 1.
        sequential: measured behind the layers already pruned and repaired.

    Raises:
        ConfigError: a value out of range.
    """

    def __init__(self, ridge: float = 1e-2, direct_up_to: int = 8192, num_sweeps: int = 10, sequential: bool = True) -> None:
        self.ridge = _check_ridge(ridge)
        if direct_up_to < 0 or num_sweeps < 1:
            raise ConfigError(
                f"pruning.repair: direct_up_to={direct_up_to}, num_sweeps={num_sweeps}; give at least 0 for the first and 1 for the second"
            )
        self.direct_up_to = direct_up_to
        self.num_sweeps = num_sweeps
        self.is_sequential = sequential

    def __call__(self, before: Experts, after: RaggedExperts, inputs: ExpertInputs) -> LayerRepair:
        kept, down_SD = Activations(after, inputs), after.down_proj.detach()
        lost_TD = _lost(before, after, inputs)
        solve = self._direct if sum(after.widths) <= self.direct_up_to else self._blockwise
        repaired_SD = _rounded(down_SD, solve(kept, lost_TD))
        change_E = (repaired_SD - down_SD).float().split(after.widths)
        error = float(lost_TD.square().sum(dtype=torch.float64))
        for expert, change_SD in enumerate(change_E):  # what the rounded columns still lose
            lost_TD[kept.tokens(expert)] -= kept.z(expert) @ change_SD
        error_after = float(lost_TD.square().sum(dtype=torch.float64))
        if error_after >= error:
            repaired_SD, error_after, change_E = down_SD, error, ()
        num_tokens, num_repaired = len(inputs.hidden_TD), sum(bool(change_SD.any()) for change_SD in change_E)
        return LayerRepair(repaired_SD, error / num_tokens, error_after / num_tokens, num_repaired)

    def _direct(self, kept: Activations, lost_TD: Tensor) -> Tensor:
        """Change of the columns (S, D), from the normal equations of the whole layer."""
        size = sum(kept.widths)
        A_SS = torch.zeros(size, size, dtype=torch.float64, device=lost_TD.device)
        B_SD = torch.zeros(size, lost_TD.shape[1], dtype=torch.float64, device=lost_TD.device)
        for chunk, z_tS in kept.chunks_of_z():
            A_SS += z_tS.T @ z_tS  # products of a chunk in float32, their sum in float64
            B_SD += z_tS.T @ lost_TD[chunk]
        return _solve(A_SS, B_SD, self.ridge * _mean([A_SS.diagonal()]))

    def _blockwise(self, kept: Activations, lost_TD: Tensor) -> Tensor:
        """The same by block coordinate descent. With D the change of an expert's columns so far and R the residual that all
        changes leave, its step is (C + r I)^-1 (sum z R^T - r D): the exact minimum over the block."""
        residual_TD, factors = lost_TD.clone(), []
        for expert in range(len(kept.widths)):
            z_nS = kept.z(expert)
            factors.append((z_nS.T @ z_nS).double())
        ridge = max(_TINY, self.ridge * _mean([C_SS.diagonal() for C_SS in factors]))
        for C_SS in factors:  # in place: from here on only the factors are needed
            C_SS.diagonal().add_(ridge)
            torch.linalg.cholesky(C_SS, out=C_SS)
        change_E = [torch.zeros(width, lost_TD.shape[1], dtype=torch.float64, device=lost_TD.device) for width in kept.widths]
        for _ in range(self.num_sweeps):
            for expert, (factor_SS, change_SD) in enumerate(zip(factors, change_E, strict=True)):
                token_n, z_nS = kept.tokens(expert), kept.z(expert)
                step_SD = torch.cholesky_solve((z_nS.T @ residual_TD[token_n]).double() - ridge * change_SD, factor_SS)
                change_SD.add_(step_SD)
                residual_TD[token_n] -= z_nS @ step_SD.float()
        return torch.cat(change_E)


_TINY = 1e-30  # keeps a matrix of zeros invertible: that of an expert which no token reached


class Activations:
    """The activations of a layer's experts on its inputs, in float32, made anew whenever they are asked for: they are the model's
    largest tensors."""

    def __init__(self, experts: Experts, inputs: ExpertInputs) -> None:
        self.widths = widths_of(experts)
        self._matrices, self._activation = list(matrices_of(experts)), activation_of(experts)
        self._inputs = inputs
        self._pairs = [inputs.pairs(expert) for expert in range(len(self.widths))]

    def tokens(self, expert: int) -> Tensor:
        return self._pairs[expert][0]

    def p(self, expert: int) -> Tensor:
        """Router weights (n, 1)."""
        return self._pairs[expert][1].float().unsqueeze(1)

    def down(self, expert: int) -> Tensor:
        """Columns w_k (D, S), in the model's dtype."""
        return self._matrices[expert].down_DF.detach()

    def h(self, expert: int, token_n: Tensor | None = None) -> Tensor:
        """(n, S), of all tokens of the expert unless said."""
        matrices = self._matrices[expert]
        hidden_nD = self._inputs.hidden_TD[self.tokens(expert) if token_n is None else token_n]
        return self._activation(F.linear(hidden_nD, matrices.inputs_GD.detach(), _detached(matrices.inputs_bias_G))).float()

    def z(self, expert: int) -> Tensor:
        """p h (n, S)."""
        return self.p(expert) * self.h(expert)

    def output(self, expert: int) -> Tensor:
        """E(x) without its bias (n, D)."""
        return self.h(expert) @ self.down(expert).float().T

    def chunks_of_z(self) -> Iterator[tuple[slice, Tensor]]:
        """z of all experts (t, S) for some tokens after others."""
        num_tokens, ends = len(self._inputs.hidden_TD), list(accumulate(self.widths, initial=0))
        for start in range(0, num_tokens, CHUNK):
            stop = min(start + CHUNK, num_tokens)
            z_tS = torch.zeros(stop - start, ends[-1], dtype=torch.float32, device=self._inputs.hidden_TD.device)
            for expert, (first, last) in enumerate(pairwise(ends)):
                token_n = self.tokens(expert)
                chosen_n = (token_n >= start) & (token_n < stop)
                z_tS[token_n[chosen_n] - start, first:last] = self.p(expert)[chosen_n] * self.h(expert, token_n[chosen_n])
            yield slice(start, stop), z_tS


def _lost(before: Experts, after: Experts, inputs: ExpertInputs) -> Tensor:
    """What the layer's output lost on its inputs (T, D), float32."""
    old, new = Activations(before, inputs), Activations(after, inputs)
    lost_TD = torch.zeros_like(inputs.hidden_TD, dtype=torch.float32)
    for expert in range(len(new.widths)):
        lost_TD[old.tokens(expert)] += old.p(expert) * (old.output(expert) - new.output(expert))
    return lost_TD


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


def _check_ridge(ridge: float) -> float:
    if not 0 < ridge < float("inf"):
        raise ConfigError(f"pruning.repair.ridge={ridge} is not above 0; give for example 0.01")
    return ridge


def _solve(C_SS: Tensor, B_SD: Tensor, ridge: float) -> Tensor:
    """(C + ridge I)^-1 B in float64."""
    regular_SS = C_SS + max(ridge, _TINY) * torch.eye(len(C_SS), dtype=C_SS.dtype, device=C_SS.device)
    return torch.cholesky_solve(B_SD, torch.linalg.cholesky(regular_SS))


def _mean(diagonals: Sequence[Tensor]) -> float:
    """Mean of some matrices' diagonals; 0 if they are empty."""
    diagonal = torch.cat(list(diagonals))
    return float(diagonal.mean()) if len(diagonal) else 0.0


def _rounded(down: Tensor, change: Tensor) -> Tensor:
    """Columns plus their change, in the columns' dtype."""
    return (down.double() + change).to(down.dtype)
