"""How families store a layer's routed experts, and the words that every forward of them shares.

In: an experts module, dense or ragged. Out: its `Layout`, activation, routing, and each expert's `Matrices`.
Copied beside pruned checkpoints and loaded where heapr is not installed: it imports torch alone.
Shape letters: T tokens, D model width, E experts, F atomic experts of an expert (of the widest one, where
experts differ), G rows of the input projection (2F with a gate, else F), K experts per token, S (token,
expert) pairs sorted by expert, n tokens of one expert.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

Experts = (
    Any  # an experts module of transformers or RaggedExperts; nn.Module does not declare what they share
)
RAGGED = "has_individual_widths"  # an attribute of their class
OUTSIDE_INTERFACE = (
    "Llama4TextExperts"  # Llama-4 weighs the experts' inputs and does without transformers' experts interface
)


class ExpertObserver(Protocol):
    """Sees what a layer's experts make of their tokens, once per forward; a forward that routes no token does
    not call it.

    Args:
        h_SF: intermediate activations, part of the graph: one hook on it gets the gradients of all. Columns
            beyond an expert's own width are zero.
        router_weight_S: p of each pair.
        output_SD: E(x) before p multiplies it, part of the graph.
        offsets: int64 (E+1,): expert e owns the rows offsets[e] to offsets[e + 1]. It lies where the forward
            has it without waiting for a device: the loop's on the CPU.
    """

    def __call__(self, h_SF: Tensor, router_weight_S: Tensor, output_SD: Tensor, offsets: Tensor) -> None: ...


class Layout(NamedTuple):
    """How a family stores its experts.

    Attributes:
        has_gate: the input projection holds W_gate and W_up, else W_up alone.
        has_bias: both projections have biases.
        is_transposed: matrices are stored (in, out) instead of (out, in).
        is_concatenated: rows are [W_gate; W_up], else gate and up alternate.
        weighs_input: the router weight multiplies the expert's input instead of its output.
    """

    has_gate: bool = True
    has_bias: bool = False
    is_transposed: bool = False
    is_concatenated: bool = True
    weighs_input: bool = False

    @property
    def input_name(self) -> str:
        return "gate_up_proj" if self.has_gate else "up_proj"

    def rows(self, kept_F: Tensor) -> Tensor:
        """Which rows of the input projection belong to the kept atomic experts, (..., F) -> (..., G)."""
        if not self.has_gate:
            return kept_F
        return (
            torch.cat([kept_F, kept_F], dim=-1)
            if self.is_concatenated
            else kept_F.repeat_interleave(2, dim=-1)
        )


class Matrices(NamedTuple):
    """One expert's weights; E(x) = down h + down_bias with h = activation(inputs x + inputs_bias)."""

    inputs_GD: Tensor
    inputs_bias_G: Tensor | None
    down_DF: Tensor
    down_bias_D: Tensor | None


def is_ragged(experts: nn.Module) -> bool:
    """By an attribute of the class: beside a checkpoint this file is another module with another class, and a
    parametrized module has a subclass of its own."""
    return hasattr(type(experts), RAGGED)


def is_behind_interface(module: nn.Module) -> bool:
    """Whether transformers lets the module's forward be chosen; its decorator sets the attribute."""
    return hasattr(module, "is_concatenated")


def is_outside_interface(module: nn.Module) -> bool:
    return type(module).__name__ == OUTSIDE_INTERFACE


def layout_of(experts: Experts) -> Layout:
    if is_ragged(experts):
        layout: Layout = experts.layout
        return layout
    if is_outside_interface(experts):
        return Layout(is_transposed=True, weighs_input=True)
    return Layout(experts.has_gate, experts.has_bias, experts.is_transposed, experts.is_concatenated)


def activation_of(experts: Experts) -> Callable[[Tensor], Tensor]:
    """The family's own map from the input projection (n, G) to h (n, F); it holds no parameters of the
    experts."""
    if is_ragged(experts):
        activation: Callable[[Tensor], Tensor] = experts.activation
        return activation
    if not layout_of(experts).has_gate:
        return partial(_call, experts.act_fn)
    if is_outside_interface(experts):
        return partial(_gated, experts.act_fn)
    return FamilyGate(experts)


class FamilyGate:
    """A family's own map from gate and up to h; a class, because pickle takes no method of the experts."""

    def __init__(self, experts: Experts) -> None:
        self.experts = copy.copy(experts)
        self.experts._parameters = {}

    def __call__(self, gate_up_nG: Tensor) -> Tensor:
        h_nF: Tensor = self.experts._apply_gate(gate_up_nG)
        return h_nF


def model_width_of(experts: Experts) -> int:
    """D."""
    if is_ragged(experts):
        return int(experts.down_proj.shape[1])
    return int(experts.down_proj.shape[2 if layout_of(experts).is_transposed else 1])


def widths_of(experts: Experts) -> list[int]:
    """Atomic experts of each expert."""
    if is_ragged(experts):
        return list(experts.widths)
    width = int(experts.down_proj.shape[1 if layout_of(experts).is_transposed else 2])
    return [width] * int(experts.num_experts)


def matrices_of(experts: Experts) -> Iterator[Matrices]:
    """Every expert's weights; views of the module's own memory."""
    layout, widths = layout_of(experts), widths_of(experts)
    inputs, inputs_bias = (
        getattr(experts, layout.input_name),
        getattr(experts, f"{layout.input_name}_bias", None),
    )
    down_bias = getattr(experts, "down_proj_bias", None)
    if is_ragged(experts):
        num_inputs = [(2 if layout.has_gate else 1) * width for width in widths]
        inputs_E = inputs.split(num_inputs)
        bias_E = [None] * len(widths) if inputs_bias is None else inputs_bias.split(num_inputs)
        down_E = [rows.T for rows in experts.down_proj.split(widths)]
    else:
        inputs_E = inputs.transpose(1, 2) if layout.is_transposed else inputs
        bias_E = [None] * len(widths) if inputs_bias is None else inputs_bias
        down_E = experts.down_proj.transpose(1, 2) if layout.is_transposed else experts.down_proj
    down_bias_E = [None] * len(widths) if down_bias is None else down_bias
    for inputs_GD, bias_G, down_DF, bias_D in zip(inputs_E, bias_E, down_E, down_bias_E, strict=True):
        yield Matrices(inputs_GD, bias_G, down_DF, bias_D)


def routing_of(experts: Experts, hidden_TD: Tensor, *routing: Tensor) -> tuple[Tensor, Tensor]:
    """expert_TK and router_weight_TK. A family that weighs the input does not say them: its T rows are
    (E*tokens, D), for every expert all tokens, those of zeros not routed; K is then 1, the router weight 1,
    and the expert of a row that was not routed number E."""
    if not layout_of(experts).weighs_input:
        expert_TK, router_weight_TK = routing
        return expert_TK, router_weight_TK
    num_experts = int(experts.num_experts)
    expert_T = torch.arange(num_experts, device=hidden_TD.device).repeat_interleave(
        len(hidden_TD) // num_experts
    )
    expert_T = torch.where(hidden_TD.detach().any(dim=1), expert_T, num_experts)
    return expert_T.unsqueeze(1), torch.ones_like(expert_T, dtype=hidden_TD.dtype).unsqueeze(1)


def _gated(act_fn: Callable[[Tensor], Tensor], gate_up_nG: Tensor) -> Tensor:
    gate_nF, up_nF = gate_up_nG.chunk(2, dim=-1)
    return act_fn(gate_nF) * up_nF


def _call(act_fn: Callable[[Tensor], Tensor], up_nF: Tensor) -> Tensor:
    return act_fn(up_nF)
