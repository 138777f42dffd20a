"""Activations, outputs and slopes of a layer's experts, for repair.

In: experts and `ExpertInputs`. Out: float32 tensors. They are recomputed at each call, because holding all of
them would take more memory than anything else.
Shape letters: T tokens, D model width, E experts, n tokens of one expert, t tokens of a chunk, S atomic
experts of one expert or of the layer, G rows of an expert's input projection (those of W_gate and W_up).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from heapr.model.expert_inputs import ExpertInputs
from heapr.model.experts.layout import Experts, activation_of, layout_of, matrices_of, widths_of

CHUNK = 8192  # tokens for which the activations of all experts are held at once


class Activations:
    """The experts of one layer applied to its inputs.

    Args:
        experts: dense or ragged.
        inputs: the layer's.
    """

    def __init__(self, experts: Experts, inputs: ExpertInputs) -> None:
        self.widths = widths_of(experts)
        self.inputs = inputs
        self._matrices = list(matrices_of(experts))
        self._activation = activation_of(experts)
        self._layout = layout_of(experts)
        self._pairs = inputs.pairs(len(self.widths))

    def tokens(self, expert: int) -> Tensor:
        """Indices (n,) of the tokens routed to an expert."""
        return self._pairs[expert][0]

    def p(self, expert: int) -> Tensor:
        """Router weights (n, 1)."""
        p_n = self._pairs[expert][1].float()
        return p_n.unsqueeze(1)

    def x(self, expert: int) -> Tensor:
        """The expert's inputs (n, D)."""
        token_n = self.tokens(expert)
        hidden_nD = self.inputs.hidden_TD.index_select(0, token_n)
        return hidden_nD.float()

    def down(self, expert: int) -> Tensor:
        """Columns w_k (D, S), in the model's dtype."""
        matrices = self._matrices[expert]
        return matrices.down_DF.detach()

    def h(self, expert: int, token_n: Tensor | None = None) -> Tensor:
        """Activations h (n, S) of the given tokens, or of all tokens of the expert."""
        if token_n is None:
            token_n = self.tokens(expert)
        projected_nG = self._projected(expert, token_n)
        return self._activation(projected_nG).float()

    def z(self, expert: int) -> Tensor:
        """Activations times router weights, p h (n, S)."""
        return self.p(expert) * self.h(expert)

    def output(self, expert: int) -> Tensor:
        """E(x) (n, D) without the bias of W_down."""
        h_nS = self.h(expert)
        down_DS = self.down(expert).float()
        return h_nS @ down_DS.T

    def slopes(self, expert: int) -> Tensor:
        """dh_k/da_r (n, G), with a_r the product of row r and x, and h_k the activation that it enters."""
        token_n = self.tokens(expert)
        projected_nG = self._projected(expert, token_n)
        slope_nG = torch.zeros_like(projected_nG)
        for rows in self.row_sets(expert):
            only_nG = torch.zeros_like(projected_nG)
            only_nG[:, rows] = 1
            value_and_slope = torch.func.jvp(self._activation, (projected_nG,), (only_nG,))
            slope_nG[:, rows] = value_and_slope[1]
        return slope_nG.float()

    def row_sets(self, expert: int) -> list[slice]:
        """Slices of the input projection: the rows of W_gate (if the experts have one) and those of W_up.

        Each slice is in the order of atomic experts.
        """
        width = self.widths[expert]
        first_half = slice(0, width)
        second_half = slice(width, 2 * width)
        even = slice(0, None, 2)
        odd = slice(1, None, 2)
        if not self._layout.has_gate:
            return [first_half]
        return [first_half, second_half] if self._layout.is_concatenated else [even, odd]

    def chunks_of_z(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield z of all experts (t, S), chunk by chunk, with the slice of tokens that each chunk covers."""
        hidden_TD = self.inputs.hidden_TD
        num_tokens = len(hidden_TD)
        size = sum(self.widths)
        for start in range(0, num_tokens, CHUNK):
            chunk = slice(start, min(start + CHUNK, num_tokens))
            z_tS = torch.zeros(chunk.stop - start, size, dtype=torch.float32, device=hidden_TD.device)
            for expert, columns_tS in enumerate(z_tS.split(self.widths, dim=1)):
                self._add_z(columns_tS, expert, chunk)
            yield chunk, z_tS

    def _add_z(self, columns_tS: Tensor, expert: int, chunk: slice) -> None:
        """Add an expert's z of a chunk's tokens to the rows of these tokens."""
        token_n = self.tokens(expert)
        is_chosen_n = (token_n >= chunk.start) & (token_n < chunk.stop)
        chosen_n = token_n[is_chosen_n]
        p_n1 = self.p(expert)[is_chosen_n]
        z_nS = p_n1 * self.h(expert, chosen_n)
        columns_tS.index_add_(0, chosen_n - chunk.start, z_nS)

    def _projected(self, expert: int, token_n: Tensor) -> Tensor:
        """Inputs of the activation function (n, G)."""
        matrices = self._matrices[expert]
        bias_G = matrices.inputs_bias_G
        if bias_G is not None:
            bias_G = bias_G.detach()
        inputs_GD = matrices.inputs_GD.detach()
        hidden_nD = self.inputs.hidden_TD.index_select(0, token_n)
        return F.linear(hidden_nD, inputs_GD, bias_G)


def layer_output(experts: Experts, inputs: ExpertInputs) -> Tensor:
    """Output of a layer's routed experts: the sum of p E(x) over each token's experts, float32 (T, D).

    Biases of W_down are left out, because repair does not change them.
    """
    activations = Activations(experts, inputs)
    output_TD = torch.zeros_like(inputs.hidden_TD, dtype=torch.float32)
    for expert in range(len(activations.widths)):
        weighted_nD = activations.p(expert) * activations.output(expert)
        token_n = activations.tokens(expert)
        output_TD.index_add_(0, token_n, weighted_nD)
    return output_TD


def first_not_finite(experts: Experts, inputs: ExpertInputs) -> int | None:
    """The first expert whose activations or outputs are NaN or infinite, or have infinite squares."""
    activations = Activations(experts, inputs)
    for expert in range(len(activations.widths)):
        tensors = activations.z(expert), activations.output(expert)
        if not all(bool(tensor.square().isfinite().all()) for tensor in tensors):
            return expert
    return None
