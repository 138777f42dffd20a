"""How families store a layer's routed experts, and the functions that every experts forward shares.

In: an experts module, dense or ragged. Out: its `Layout`, activation, routing, and each expert's `Matrices`.
This file is copied beside pruned checkpoints and loaded where heapr is not installed: it imports torch alone.
Shape letters: T tokens, D model width, E experts, F atomic experts of an expert (of the widest one, if
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

# An experts module of transformers, or RaggedExperts; nn.Module does not declare what they share.
Experts = Any
RAGGED = "has_individual_widths"  # an attribute of their class
# Llama-4 weighs the experts' inputs and does not use transformers' experts interface.
OUTSIDE_INTERFACE = "Llama4TextExperts"


class ExpertObserver(Protocol):
    """Called once per forward with the activations and outputs of a layer's experts for all their tokens.

    It is not called if no token is routed. With an observer that also has `add(Pairs)` (grouped.py), a GPU
    keeps less: the grouped forward calls `add` instead, in its backward pass.

    Args:
        h_SF: intermediate activations, part of the graph: one hook on it gets all gradients. Columns beyond
            an expert's own width are zero.
        router_weight_S: p of each pair.
        output_SD: E(x) before p multiplies it, part of the graph.
        offsets: int64 (E+1,): expert e owns the rows offsets[e] to offsets[e + 1]. It is on whichever device
            the forward has it without waiting: on the CPU for the loop.
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
        """Mask of the input projection's rows that belong to kept atomic experts, (..., F) -> (..., G)."""
        if not self.has_gate:
            return kept_F
        if self.is_concatenated:
            return torch.cat([kept_F, kept_F], dim=-1)
        return kept_F.repeat_interleave(2, dim=-1)

    def gate_and_up(self, inputs_GD: Tensor) -> tuple[Tensor, Tensor]:
        """W_gate and W_up (F, D), views of a gated expert's input projection."""
        if self.is_concatenated:
            gate_FD, up_FD = inputs_GD.chunk(2)
            return gate_FD, up_FD
        return inputs_GD[::2], inputs_GD[1::2]


class Matrices(NamedTuple):
    """One expert's weights; E(x) = down h + down_bias with h = activation(inputs x + inputs_bias)."""

    inputs_GD: Tensor
    inputs_bias_G: Tensor | None
    down_DF: Tensor
    down_bias_D: Tensor | None


def is_ragged(experts: nn.Module) -> bool:
    """Whether experts are `RaggedExperts`.

    Looks for an attribute of the class: the copy of this file beside a checkpoint is a different module with
    its own class, and a parametrized module has a subclass of its own.
    """
    return hasattr(type(experts), RAGGED)


def is_behind_interface(module: nn.Module) -> bool:
    """Whether transformers lets users choose the module's forward; its decorator sets the attribute."""
    return hasattr(module, "is_concatenated")


def is_outside_interface(module: nn.Module) -> bool:
    """Whether a module is Llama-4's experts."""
    return type(module).__name__ == OUTSIDE_INTERFACE


def layout_of(experts: Experts) -> Layout:
    """How a module stores its experts."""
    if is_ragged(experts):
        layout: Layout = experts.layout
        return layout
    if is_outside_interface(experts):
        return Layout(is_transposed=True, weighs_input=True)
    return Layout(experts.has_gate, experts.has_bias, experts.is_transposed, experts.is_concatenated)


def activation_of(experts: Experts) -> Callable[[Tensor], Tensor]:
    """The family's own function from the input projection (n, G) to h (n, F), without parameters."""
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
    dim = 2 if layout_of(experts).is_transposed else 1
    return int(experts.down_proj.shape[dim])


def widths_of(experts: Experts) -> list[int]:
    """Number of atomic experts of each expert."""
    if is_ragged(experts):
        return list(experts.widths)
    dim = 1 if layout_of(experts).is_transposed else 2
    return [int(experts.down_proj.shape[dim])] * int(experts.num_experts)


def matrices_of(experts: Experts) -> Iterator[Matrices]:
    """Every expert's weights, as views of the module's memory."""
    layout, widths = layout_of(experts), widths_of(experts)
    no_bias_E = [None] * len(widths)
    inputs_E = getattr(experts, layout.input_name)
    inputs_bias = getattr(experts, f"{layout.input_name}_bias", None)
    inputs_bias_E = no_bias_E if inputs_bias is None else inputs_bias
    down_E = experts.down_proj
    down_bias = getattr(experts, "down_proj_bias", None)
    down_bias_E = no_bias_E if down_bias is None else down_bias
    if is_ragged(experts):
        rows_per_atomic = 2 if layout.has_gate else 1
        num_rows = [rows_per_atomic * width for width in widths]
        inputs_E = inputs_E.split(num_rows)
        if inputs_bias is not None:
            inputs_bias_E = inputs_bias.split(num_rows)
        down_E = [rows.T for rows in down_E.split(widths)]
    elif layout.is_transposed:
        inputs_E, down_E = inputs_E.transpose(1, 2), down_E.transpose(1, 2)
    for weights in zip(inputs_E, inputs_bias_E, down_E, down_bias_E, strict=True):
        yield Matrices(*weights)


def routing_of(experts: Experts, hidden_TD: Tensor, *routing: Tensor) -> tuple[Tensor, Tensor]:
    """expert_TK and router_weight_TK.

    Families that weigh the input do not pass them. Their T rows are (E*tokens, D), all tokens once for each
    expert, and a row of zeros was not routed. For them K is 1, every router weight 1, and a row that was not
    routed has expert number E.
    """
    if not layout_of(experts).weighs_input:
        expert_TK, router_weight_TK = routing
        return expert_TK, router_weight_TK
    num_experts = int(experts.num_experts)
    num_tokens = len(hidden_TD) // num_experts
    expert_T = torch.arange(num_experts, device=hidden_TD.device).repeat_interleave(num_tokens)
    is_routed_T = hidden_TD.detach().any(dim=1)
    expert_T1 = torch.where(is_routed_T, expert_T, num_experts).unsqueeze(1)
    return expert_T1, torch.ones_like(expert_T1, dtype=hidden_TD.dtype)


def _gated(act_fn: Callable[[Tensor], Tensor], gate_up_nG: Tensor) -> Tensor:
    """act(gate) * up."""
    gate_nF, up_nF = gate_up_nG.chunk(2, dim=-1)
    return act_fn(gate_nF) * up_nF


def _call(act_fn: Callable[[Tensor], Tensor], up_nF: Tensor) -> Tensor:
    return act_fn(up_nF)
