"""Experts of individual widths: what remains of a layer's experts after pruning.

This file is copied beside pruned checkpoints and loaded where heapr is not installed: it imports torch alone.
Shape letters: T tokens, D model width, E experts, R atomic experts of the layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from .grouped import run_fastest
from .layout import ExpertObserver, Experts, Matrices, activation_of, layout_of, matrices_of, model_width_of
from .packed import Packed
from .traced import run_traced


class RaggedExperts(nn.Module):
    """Experts of individual widths, one layer.

    Atomic experts are packed as rows, expert after expert. With R the number of atomic experts kept in the
    layer and expert e owning the rows [start_e, end_e):

        gate_up_proj (2R, D): rows 2*start_e .. 2*end_e in the family's own order
        up_proj (R, D): instead, in families without a gate
        down_proj (R, D): rows start_e .. end_e are the columns w_k of e's W_down
        gate_up_proj_bias (2R), down_proj_bias (E, D): where the family has them

    An expert of width 0 contributes its down_proj_bias, or nothing. The router stays as it is. The forward
    takes the same arguments as the family's own experts.

    Args:
        template: experts of the same layer, dense or ragged; layout, activation, dtype and device are theirs.
        widths: number of atomic experts of every expert.
    """

    has_individual_widths = True  # what `is_ragged` looks for

    def __init__(self, template: Experts, widths: Sequence[int]) -> None:
        super().__init__()
        self.widths = tuple(widths)
        self.num_experts = len(self.widths)
        self.layout = layout_of(template)
        self.activation = activation_of(template)
        self.observer: ExpertObserver | None = None
        self.run: Callable[..., Tensor] = run_fastest
        self.packed: Packed | None = None
        num_rows, model_width = sum(self.widths), model_width_of(template)
        num_inputs = 2 * num_rows if self.layout.has_gate else num_rows
        input_name = self.layout.input_name
        new_empty = template.down_proj.new_empty
        self.register_parameter(input_name, nn.Parameter(new_empty(num_inputs, model_width)))
        self.down_proj = nn.Parameter(new_empty(num_rows, model_width))
        if self.layout.has_bias:
            self.register_parameter(f"{input_name}_bias", nn.Parameter(new_empty(num_inputs)))
            self.down_proj_bias = nn.Parameter(new_empty(self.num_experts, model_width))

    def forward(self, hidden_TD: Tensor, *routing: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return run_traced(self, hidden_TD, *routing)
        return self.run(self, hidden_TD, *routing)

    @torch.no_grad()
    def fill(self, matrices: Iterable[Matrices]) -> RaggedExperts:
        """Copy every expert's weights in and return self."""
        for mine, given in zip(matrices_of(self), matrices, strict=True):
            for target, source in zip(mine, given, strict=True):
                if target is not None and source is not None:
                    target.copy_(source)
        return self


def make_ragged(model: nn.Module, expert_widths: Mapping[str, Sequence[int]]) -> None:
    """Replace experts modules, given by name, with ragged ones of these widths; their weights are not set."""
    for name, widths in expert_widths.items():
        parent, _, child = name.rpartition(".")
        ragged = RaggedExperts(model.get_submodule(name), widths)
        setattr(model.get_submodule(parent), child, ragged)
