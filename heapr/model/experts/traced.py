"""The forward of ragged experts that torch.compile, vLLM and exporters trace as a whole: every shape is known
without looking at the data.

The loop reads on the host how many tokens each expert has. Here all (token, expert) pairs stay in one tensor
as wide as the widest expert, and three operators of torch.ops.heapr read the numbers when they run.
Copied beside pruned checkpoints and loaded where heapr is not installed: it imports torch alone.
Shape letters: layout.py; E1 experts and "none"; R rows of the packed input projection of a layer; B blocks of
an expert's rows ([W_gate; W_up] are two); P columns of all blocks, B times the width of the widest block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import Experts, activation_of, layout_of, routing_of, widths_of


def run_traced(experts: Experts, hidden_TD: Tensor, *routing: Tensor) -> Tensor:
    """What `loop.run_experts` computes, for ragged experts; arguments as there."""
    expert_TK, router_weight_TK = routing_of(experts, hidden_TD, *routing)
    widths, num_experts = widths_of(experts), int(experts.num_experts)
    if not any(widths) and not layout_of(experts).has_bias:
        return torch.zeros_like(hidden_TD)
    expert_S, order_S = torch.sort(expert_TK.reshape(-1), stable=True)
    token_S = order_S // expert_TK.shape[1]
    count_E1 = torch.zeros(num_experts + 1, dtype=torch.int64, device=hidden_TD.device)
    count_E1 = count_E1.scatter_add(0, expert_S, torch.ones_like(expert_S))
    output_SD = _outputs(experts, hidden_TD[token_S], expert_S, count_E1)
    router_weight_S = router_weight_TK.reshape(-1)[order_S] * (expert_S < num_experts)
    weighted_SD = (output_SD * router_weight_S.unsqueeze(-1)).to(hidden_TD.dtype)
    return torch.zeros_like(hidden_TD).index_add(0, token_S, weighted_SD)


def _outputs(experts: Experts, hidden_SD: Tensor, expert_S: Tensor, count_E1: Tensor) -> Tensor:
    """E(x) of every pair, (S, D); of pairs without an expert anything."""
    layout, widths = layout_of(experts), widths_of(experts)
    num_blocks, widths_in_rows = _blocks(experts)
    known_S = expert_S.clamp(max=len(widths) - 1)
    inputs_SP = torch.ops.heapr.expand_segments(
        hidden_SD, getattr(experts, layout.input_name), count_E1, widths_in_rows, num_blocks
    )
    if layout.has_bias:
        inputs_SP = inputs_SP + _padded_bias(experts)[known_S]
    h_SF = activation_of(experts)(inputs_SP)
    output_SD: Tensor = torch.ops.heapr.contract_segments(h_SF, experts.down_proj, count_E1, widths, 1)
    return output_SD + experts.down_proj_bias[known_S] if layout.has_bias else output_SD


def _blocks(experts: Experts) -> tuple[int, list[int]]:
    """How many blocks the rows of an expert's input projection have, and a block's rows, expert by expert."""
    layout, widths = layout_of(experts), widths_of(experts)
    if layout.has_gate and layout.is_concatenated:
        return 2, widths
    return 1, [width * (2 if layout.has_gate else 1) for width in widths]


def _padded_bias(experts: Experts) -> Tensor:
    """Biases of the input projection, (E, P), zero where an expert has no row."""
    bias_R = getattr(experts, f"{layout_of(experts).input_name}_bias")
    num_blocks, widths = _blocks(experts)
    widest = max(widths)
    bias_E = bias_R.split([num_blocks * width for width in widths])
    padded = []
    for bias, width in zip(bias_E, widths, strict=True):
        blocks = bias.view(num_blocks, width)
        padded.append(F.pad(blocks, (0, widest - width)).reshape(-1))
    return torch.stack(padded)


Segment = tuple[slice, slice, int]  # an expert's pairs, its rows, and its width
Gradients = tuple[
    Tensor | None, Tensor | None, None, None, None
]  # an operator's arguments, two of them tensors


def _segments(count_E1: Tensor, widths: Sequence[int], num_blocks: int) -> Iterator[Segment]:
    """The experts that have pairs and rows."""
    first_pair, first_row = 0, 0
    for count, width in zip(count_E1.tolist(), widths, strict=False):  # "none" has no width
        pairs, rows = slice(first_pair, first_pair + count), slice(first_row, first_row + num_blocks * width)
        first_pair, first_row = pairs.stop, rows.stop
        if count and width:
            yield pairs, rows, width


def expand_segments(
    hidden_SD: Tensor, weight_RD: Tensor, count_E1: Tensor, widths: Sequence[int], num_blocks: int
) -> Tensor:
    """Each pair times its own expert's rows, (S, P); zero beyond an expert's width."""
    expanded_SBF = hidden_SD.new_zeros(len(hidden_SD), num_blocks, max(widths))
    for pairs, rows, width in _segments(count_E1, widths, num_blocks):
        own_nG = F.linear(hidden_SD[pairs], weight_RD[rows])
        expanded_SBF[pairs, :, :width] = own_nG.view(-1, num_blocks, width)
    return expanded_SBF.flatten(1)


def contract_segments(
    expanded_SP: Tensor, weight_RD: Tensor, count_E1: Tensor, widths: Sequence[int], num_blocks: int
) -> Tensor:
    """The transpose of `expand_segments`: sum over an expert's rows of entry times row, (S, D)."""
    contracted_SD = expanded_SP.new_zeros(len(expanded_SP), weight_RD.shape[1])
    expanded_SBF = expanded_SP.view(-1, num_blocks, max(widths))
    for pairs, rows, width in _segments(count_E1, widths, num_blocks):
        own_nG = expanded_SBF[pairs, :, :width].reshape(-1, num_blocks * width)
        contracted_SD[pairs] = F.linear(own_nG, weight_RD[rows].T)
    return contracted_SD


def outer_segments(
    expanded_SP: Tensor, hidden_SD: Tensor, count_E1: Tensor, widths: Sequence[int], num_blocks: int
) -> Tensor:
    """Sum over each expert's pairs of entry times hidden state, (R, D): both gradients for the weight."""
    outer_RD = hidden_SD.new_zeros(num_blocks * sum(widths), hidden_SD.shape[1])
    expanded_SBF = expanded_SP.view(-1, num_blocks, max(widths))
    for pairs, rows, width in _segments(count_E1, widths, num_blocks):
        own_nG = expanded_SBF[pairs, :, :width].reshape(-1, num_blocks * width)
        outer_RD[rows] = own_nG.T @ hidden_SD[pairs]
    return outer_RD


def _expand_fake(
    hidden_SD: Tensor, weight_RD: Tensor, count_E1: Tensor, widths: Sequence[int], num_blocks: int
) -> Tensor:
    return hidden_SD.new_empty(hidden_SD.shape[0], num_blocks * max(widths))


def _contract_fake(
    expanded_SP: Tensor, weight_RD: Tensor, count_E1: Tensor, widths: Sequence[int], num_blocks: int
) -> Tensor:
    return expanded_SP.new_empty(expanded_SP.shape[0], weight_RD.shape[1])


def _outer_fake(
    expanded_SP: Tensor, hidden_SD: Tensor, count_E1: Tensor, widths: Sequence[int], num_blocks: int
) -> Tensor:
    return hidden_SD.new_empty(num_blocks * sum(widths), hidden_SD.shape[1])


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, weight_RD, count_E1, ctx.widths, ctx.num_blocks = inputs
    ctx.save_for_backward(values, weight_RD, count_E1)


def _expand_backward(ctx: Any, grad_SP: Tensor) -> Gradients:
    hidden_SD, weight_RD, count_E1 = ctx.saved_tensors
    rest = (count_E1, ctx.widths, ctx.num_blocks)
    grad_SP = grad_SP.contiguous()
    needs_hidden, needs_weight, *_ = ctx.needs_input_grad
    grad_hidden = torch.ops.heapr.contract_segments(grad_SP, weight_RD, *rest) if needs_hidden else None
    grad_weight = torch.ops.heapr.outer_segments(grad_SP, hidden_SD, *rest) if needs_weight else None
    return grad_hidden, grad_weight, None, None, None


def _contract_backward(ctx: Any, grad_SD: Tensor) -> Gradients:
    expanded_SP, weight_RD, count_E1 = ctx.saved_tensors
    rest = (count_E1, ctx.widths, ctx.num_blocks)
    needs_expanded, needs_weight, *_ = ctx.needs_input_grad
    grad_expanded = torch.ops.heapr.expand_segments(grad_SD, weight_RD, *rest) if needs_expanded else None
    grad_weight = torch.ops.heapr.outer_segments(expanded_SP, grad_SD, *rest) if needs_weight else None
    return grad_expanded, grad_weight, None, None, None


def _define(
    function: Callable[..., Tensor], fake: Callable[..., Tensor], backward: Callable[..., Gradients] | None
) -> None:
    """Make a function an operator of torch.ops.heapr, unless another copy of this file has done so."""
    name = f"heapr::{function.__name__}"
    if hasattr(torch.ops.heapr, function.__name__):
        return
    operator = torch.library.custom_op(name, function, mutates_args=())
    operator.register_fake(fake)
    if backward is not None:
        operator.register_autograd(backward, setup_context=_remember)


# When the file is imported, because a model that was pickled or compiled needs them before it is called.
_define(expand_segments, _expand_fake, _expand_backward)
_define(contract_segments, _contract_fake, _contract_backward)
_define(outer_segments, _outer_fake, None)
