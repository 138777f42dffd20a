"""What the experts of a layer make of its inputs: activations, outputs, slopes. For repair.

In: experts and `ExpertInputs`. Out: float32 tensors, made anew whenever they are asked for: they are the model's largest.
Shape letters: T tokens, D model width, E experts, n tokens of one expert, t tokens of a chunk, S atomic experts of one expert or of
the layer, G rows of an expert's input projection (those of W_gate and W_up).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from heapr.model.expert_inputs import ExpertInputs
from heapr.model.experts.layout import Experts, activation_of, layout_of, matrices_of, widths_of

CHUNK = 8192  # tokens whose activations of all experts are held at once


class Activations:
    """The experts of one layer at work on its inputs.

    Args:
        experts: dense or ragged.
        inputs: what flows into them.
    """

    def __init__(self, experts: Experts, inputs: ExpertInputs) -> None:
        self.widths = widths_of(experts)
        self.inputs = inputs
        self._matrices, self._activation, self._layout = list(matrices_of(experts)), activation_of(experts), layout_of(experts)
        self._pairs = [inputs.pairs(expert) for expert in range(len(self.widths))]

    def tokens(self, expert: int) -> Tensor:
        """Indices (n,) of the tokens of an expert."""
        return self._pairs[expert][0]

    def p(self, expert: int) -> Tensor:
        """Router weights (n, 1)."""
        return self._pairs[expert][1].float().unsqueeze(1)

    def x(self, expert: int) -> Tensor:
        """The expert's inputs (n, D)."""
        return self.inputs.hidden_TD.index_select(0, self.tokens(expert)).float()

    def down(self, expert: int) -> Tensor:
        """Columns w_k (D, S), in the model's dtype."""
        return self._matrices[expert].down_DF.detach()

    def h(self, expert: int, token_n: Tensor | None = None) -> Tensor:
        """(n, S), of all tokens of the expert unless said."""
        return self._activation(self._projected(expert, self.tokens(expert) if token_n is None else token_n)).float()

    def z(self, expert: int) -> Tensor:
        """p h (n, S)."""
        return self.p(expert) * self.h(expert)

    def output(self, expert: int) -> Tensor:
        """E(x) without its bias (n, D)."""
        return self.h(expert) @ self.down(expert).float().T

    def slopes(self, expert: int) -> Tensor:
        """dh_k/da for the one or two rows a of the input projection that make h_k: (n, G)."""
        projected_nG = self._projected(expert, self.tokens(expert))
        slope_nG = torch.zeros_like(projected_nG)
        for rows in self.row_sets(expert):
            only_nG = torch.zeros_like(projected_nG)
            only_nG[:, rows] = 1
            slope_nG[:, rows] = torch.func.jvp(self._activation, (projected_nG,), (only_nG,))[1]
        return slope_nG.float()

    def row_sets(self, expert: int) -> list[slice]:
        """Rows of the input projection, in the order of atomic experts: those of W_gate, where there is one, and of W_up."""
        width = self.widths[expert]
        if not self._layout.has_gate:
            return [slice(0, width)]
        return [slice(0, width), slice(width, 2 * width)] if self._layout.is_concatenated else [slice(0, None, 2), slice(1, None, 2)]

    def chunks_of_z(self) -> Iterator[tuple[slice, Tensor]]:
        """z of all experts (t, S) for some tokens after others."""
        num_tokens, ends = len(self.inputs.hidden_TD), list(accumulate(self.widths, initial=0))
        for start in range(0, num_tokens, CHUNK):
            stop = min(start + CHUNK, num_tokens)
            z_tS = torch.zeros(stop - start, ends[-1], dtype=torch.float32, device=self.inputs.hidden_TD.device)
            for expert, (first, last) in enumerate(pairwise(ends)):
                token_n = self.tokens(expert)
                chosen_n = (token_n >= start) & (token_n < stop)
                z_nS = self.p(expert)[chosen_n] * self.h(expert, token_n[chosen_n])
                z_tS[:, first:last].index_add_(0, token_n[chosen_n] - start, z_nS)
            yield slice(start, stop), z_tS

    def _projected(self, expert: int, token_n: Tensor) -> Tensor:
        """(n, G): what the activation function sees."""
        matrices = self._matrices[expert]
        bias_G = None if matrices.inputs_bias_G is None else matrices.inputs_bias_G.detach()
        return F.linear(self.inputs.hidden_TD.index_select(0, token_n), matrices.inputs_GD.detach(), bias_G)


def layer_output(experts: Experts, inputs: ExpertInputs) -> Tensor:
    """Sum over each token's experts of p E(x), without biases of W_down, which repair leaves alone: (T, D), float32."""
    activations = Activations(experts, inputs)
    output_TD = torch.zeros_like(inputs.hidden_TD, dtype=torch.float32)
    for expert in range(len(activations.widths)):
        output_TD.index_add_(0, activations.tokens(expert), activations.p(expert) * activations.output(expert))
    return output_TD
