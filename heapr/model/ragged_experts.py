"""Experts of individual widths: what is left of a layer's experts after pruning, and the loop that runs any experts.

This file is copied beside pruned checkpoints and loaded where heapr is not installed, so it imports torch alone.
Shape letters: T tokens, D model width, E experts, F atomic experts of an expert, G rows of the input projection (2F with a
gate, else F), K experts per token, S = T*K (token, expert) pairs sorted by expert, n tokens of one expert.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Experts = Any  # an experts module of transformers or RaggedExperts; nn.Module does not declare what they share


class ExpertObserver(Protocol):
    """Sees each expert's intermediate activations as they are computed."""

    def __call__(self, expert: int, h_nF: Tensor, router_weight_n: Tensor, output_nD: Tensor) -> None: ...


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
        return torch.cat([kept_F, kept_F], dim=-1) if self.is_concatenated else kept_F.repeat_interleave(2, dim=-1)


class Matrices(NamedTuple):
    """One expert's weights; E(x) = down h + down_bias with h = activation(inputs x + inputs_bias)."""

    inputs_GD: Tensor
    inputs_bias_G: Tensor | None
    down_DF: Tensor
    down_bias_D: Tensor | None


class RaggedExperts(nn.Module):
    """Experts of individual widths, one layer.

    Atomic experts are packed as rows, expert after expert. With R the number of atomic experts kept in the layer and
    expert e owning the rows [start_e, end_e):

        gate_up_proj (2R, D): rows 2*start_e .. 2*end_e in the family's own order; without a gate up_proj (R, D)
        down_proj (R, D): rows start_e .. end_e are the columns w_k of e's W_down
        gate_up_proj_bias (2R), down_proj_bias (E, D): where the family has them

    An expert of width 0 contributes its down_proj_bias, or nothing. The router is not touched. The forward is called as
    the family calls its own experts.

    Args:
        template: experts of the same layer, dense or ragged: layout, activation, dtype and device are taken from them.
        widths: of every expert.
    """

    def __init__(self, template: Experts, widths: Sequence[int]) -> None:
        super().__init__()
        self.widths = tuple(widths)
        self.num_experts = len(self.widths)
        self.layout = layout_of(template)
        self.activation = activation_of(template)
        self.observer: ExpertObserver | None = None
        like, num_rows, model_width = template.down_proj, sum(self.widths), model_width_of(template)
        num_inputs = num_rows * (2 if self.layout.has_gate else 1)
        self.register_parameter(self.layout.input_name, nn.Parameter(like.new_empty(num_inputs, model_width)))
        self.down_proj = nn.Parameter(like.new_empty(num_rows, model_width))
        if self.layout.has_bias:
            self.register_parameter(f"{self.layout.input_name}_bias", nn.Parameter(like.new_empty(num_inputs)))
            self.down_proj_bias = nn.Parameter(like.new_empty(self.num_experts, model_width))

    @torch.compiler.disable(reason="the number of tokens of an expert is data")  # type: ignore[untyped-decorator]
    def forward(self, hidden_TD: Tensor, *routing: Tensor) -> Tensor:
        return run_experts(self, hidden_TD, *routing)

    @torch.no_grad()
    def fill(self, matrices: Iterable[Matrices]) -> RaggedExperts:
        """Copy every expert's weights in; returns itself."""
        for mine, given in zip(matrices_of(self), matrices, strict=True):
            for target, source in zip(mine, given, strict=True):
                if target is not None and source is not None:
                    target.copy_(source)
        return self


def make_ragged(model: nn.Module, expert_widths: Mapping[str, Sequence[int]]) -> None:
    """Replace experts modules, by name, by ragged ones of the given widths; their weights are not set."""
    for name, widths in expert_widths.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, RaggedExperts(model.get_submodule(name), widths))


def is_ragged(experts: nn.Module) -> bool:
    """By name: beside a checkpoint this file is another module, with a class of its own."""
    return type(experts).__name__ == RaggedExperts.__name__


def layout_of(experts: Experts) -> Layout:
    if is_ragged(experts):
        layout: Layout = experts.layout
        return layout
    if not hasattr(experts, "_apply_gate"):  # Llama-4's, outside transformers' experts interface
        return Layout(is_transposed=True, weighs_input=True)
    return Layout(experts.has_gate, experts.has_bias, experts.is_transposed, experts.is_concatenated)


def activation_of(experts: Experts) -> Callable[[Tensor], Tensor]:
    """The family's own map from the input projection (n, G) to h (n, F); it holds no parameters of the experts."""
    if is_ragged(experts):
        activation: Callable[[Tensor], Tensor] = experts.activation
        return activation
    if not layout_of(experts).has_gate:
        return partial(_call, experts.act_fn)
    if not hasattr(experts, "_apply_gate"):
        return partial(_gated, experts.act_fn)
    without_parameters = copy.copy(experts)
    without_parameters._parameters = {}
    bound: Callable[[Tensor], Tensor] = without_parameters._apply_gate
    return bound


def model_width_of(experts: Experts) -> int:
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
    inputs, inputs_bias = getattr(experts, layout.input_name), getattr(experts, f"{layout.input_name}_bias", None)
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


def run_experts(experts: Experts, hidden_TD: Tensor, *routing: Tensor) -> Tensor:
    """Sum over each token's experts of p * E(x), with E(x) = W_down h(x) (docs/method.md, 1).

    Args:
        experts: dense or ragged.
        hidden_TD: the tokens. Of a family that weighs the input: (E*T, D), for every expert all tokens times their router
            weight, zero where a token was not routed to it; the result then has this shape too.
        routing: expert_TK and router_weight_TK; nothing for a family that weighs the input. Expert number E means none.
    """
    expert_TK, router_weight_TK = routing_of(experts, hidden_TD, *routing)
    return run_sorted(experts, hidden_TD, expert_TK, router_weight_TK, counts=counts_of(experts, expert_TK))


def routing_of(experts: Experts, hidden_TD: Tensor, *routing: Tensor) -> tuple[Tensor, Tensor]:
    """expert_TK and router_weight_TK, also of a family that does not say them (see `run_experts`)."""
    if layout_of(experts).weighs_input:
        return _routing_of_weighted(hidden_TD, int(experts.num_experts))
    expert_TK, router_weight_TK = routing
    return expert_TK, router_weight_TK


def counts_of(experts: Experts, expert_TK: Tensor) -> list[int]:
    """(token, expert) pairs of every expert, and of none."""
    counts: list[int] = torch.bincount(expert_TK.reshape(-1), minlength=experts.num_experts + 1).tolist()
    return counts


def run_sorted(
    experts: Experts,
    hidden_TD: Tensor,
    expert_TK: Tensor,
    router_weight_TK: Tensor,
    *,
    counts: list[int],
    matrices_E: Iterable[Matrices] | None = None,
) -> Tensor:
    """The (token, expert) pairs are sorted by expert, so that each expert's tokens are one contiguous segment.

    Args:
        counts: pairs of every expert, and of none.
        matrices_E: every expert's weights; None takes the module's own.
    """
    matrices_E = matrices_of(experts) if matrices_E is None else matrices_E
    order_S = torch.sort(expert_TK.reshape(-1), stable=True).indices
    observer, activation = getattr(experts, "observer", None), activation_of(experts)
    if observer is None and not layout_of(experts).has_bias and 0 in widths_of(experts):
        order_S, counts = _without_empty(order_S, counts, widths_of(experts))
    token_S = order_S // expert_TK.shape[1]
    segments = zip(
        token_S.split(counts), hidden_TD[token_S].split(counts), router_weight_TK.reshape(-1)[order_S].split(counts), strict=True
    )
    total_TD = torch.zeros_like(hidden_TD)
    for expert, (matrices, (token_n, hidden_nD, router_weight_n)) in enumerate(zip(matrices_E, segments, strict=False)):
        if len(token_n) == 0:
            continue
        h_nF = activation(F.linear(hidden_nD, matrices.inputs_GD, matrices.inputs_bias_G))
        output_nD = F.linear(h_nF, matrices.down_DF, matrices.down_bias_D)
        if observer is not None:
            observer(expert, h_nF, router_weight_n, output_nD)
        # A token visits an expert once, so no index repeats: the order of additions is the same on every device and in every run.
        total_TD.index_add_(0, token_n, (output_nD * router_weight_n.unsqueeze(-1)).to(total_TD.dtype))
    return total_TD


def _without_empty(order_S: Tensor, counts: list[int], widths: list[int]) -> tuple[Tensor, list[int]]:
    """Pairs and their numbers without those of experts of width 0, which contribute nothing: their tokens are not even gathered."""
    has_work = [width > 0 for width in widths] + [False]
    kept = [segment_n for segment_n, works in zip(order_S.split(counts), has_work, strict=True) if works]
    return torch.cat(kept) if kept else order_S[:0], [count if works else 0 for count, works in zip(counts, has_work, strict=True)]


def _routing_of_weighted(hidden_SD: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Expert of every row and router weight 1: (S, 1) each. A row of zeros was not routed."""
    expert_S = torch.arange(num_experts, device=hidden_SD.device).repeat_interleave(len(hidden_SD) // num_experts)
    expert_S = torch.where(hidden_SD.detach().any(dim=1), expert_S, num_experts)
    return expert_S.unsqueeze(1), torch.ones_like(expert_S, dtype=hidden_SD.dtype).unsqueeze(1)


def _gated(act_fn: Callable[[Tensor], Tensor], gate_up_nG: Tensor) -> Tensor:
    gate_nF, up_nF = gate_up_nG.chunk(2, dim=-1)
    return act_fn(gate_nF) * up_nF


def _call(act_fn: Callable[[Tensor], Tensor], up_nF: Tensor) -> Tensor:
    return act_fn(up_nF)
