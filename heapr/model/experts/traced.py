"""The forward of ragged experts that torch.compile, vLLM and exporters trace as a whole: every shape is known
without looking at the data.

The loop reads on the host how many tokens each expert has. Here all (token, expert) pairs stay in one tensor
as wide as the widest expert, and three operators of torch.ops.heapr read the numbers when they run.
Copied beside pruned checkpoints and loaded where heapr is not installed: it imports torch alone.
Shape letters: layout.py; E1 experts and "none"; R rows of the packed input projection of a layer; B blocks of
an expert's rows ([W_gate; W_up] are two); P columns of all blocks, B times the width of the widest block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import Experts, activation_of, layout_of, routing_of, widths_of


def run_traced(experts: Experts, hidden_TD: Tensor, *routing: Tensor) -> Tensor:
    """What `loop.run_experts` computes, for ragged experts; arguments as there."""
    expert_TK, router_weight_TK = routing_of(experts, hidden_TD, *routing)
    total_TD = torch.zeros_like(hidden_TD)
    if not any(widths_of(experts)) and not layout_of(experts).has_bias:
        return total_TD
    num_experts = int(experts.num_experts)
    unsorted_S = expert_TK.reshape(-1)
    expert_S, order_S = torch.sort(unsorted_S, stable=True)
    num_chosen = expert_TK.shape[1]
    token_S = order_S // num_chosen
    count_E1 = _counts(expert_S, num_experts + 1)
    hidden_SD = hidden_TD[token_S]
    output_SD = _outputs(experts, hidden_SD, expert_S, count_E1)
    is_routed_S = expert_S < num_experts
    router_weight_S = router_weight_TK.reshape(-1)[order_S]
    p_S = router_weight_S * is_routed_S
    weighted_SD = output_SD * p_S.unsqueeze(-1)
    weighted_SD = weighted_SD.to(hidden_TD.dtype)
    return total_TD.index_add(0, token_S, weighted_SD)


def _counts(number_S: Tensor, num_numbers: int) -> Tensor:
    """How often each of the first numbers occurs, int64; bincount would look at the data for its shape."""
    zeros = torch.zeros(num_numbers, dtype=torch.int64, device=number_S.device)
    one_S = torch.ones_like(number_S)
    return zeros.scatter_add(0, number_S, one_S)


def _outputs(experts: Experts, hidden_SD: Tensor, expert_S: Tensor, count_E1: Tensor) -> Tensor:
    """E(x) of every pair, (S, D); of pairs without an expert anything."""
    layout = layout_of(experts)
    widths = widths_of(experts)
    num_blocks, rows_of = _blocks(experts)
    weight_RD = getattr(experts, layout.input_name)
    last = len(widths) - 1
    known_S = expert_S.clamp(max=last)
    inputs_SP = torch.ops.heapr.expand_segments(hidden_SD, weight_RD, count_E1, rows_of, num_blocks)
    if layout.has_bias:
        bias_EP = _padded_bias(experts)
        bias_SP = bias_EP[known_S]
        inputs_SP = inputs_SP + bias_SP
    activation = activation_of(experts)
    h_SF = activation(inputs_SP)
    output_SD: Tensor = torch.ops.heapr.contract_segments(h_SF, experts.down_proj, count_E1, widths, 1)
    if layout.has_bias:
        bias_SD = experts.down_proj_bias[known_S]
        output_SD = output_SD + bias_SD
    return output_SD


def _blocks(experts: Experts) -> tuple[int, list[int]]:
    """How many blocks the rows of an expert's input projection have, and a block's rows, expert by expert."""
    layout = layout_of(experts)
    widths = widths_of(experts)
    if not layout.has_gate:
        return 1, widths
    if layout.is_concatenated:
        return 2, widths
    return 1, [2 * width for width in widths]


def _padded_bias(experts: Experts) -> Tensor:
    """Biases of the input projection, (E, P), zero where an expert has no row."""
    layout = layout_of(experts)
    name = f"{layout.input_name}_bias"
    bias_R = getattr(experts, name)
    num_blocks, widths = _blocks(experts)
    widest = max(widths)
    sizes = [num_blocks * width for width in widths]
    bias_E = bias_R.split(sizes)
    padded = []
    for bias, width in zip(bias_E, widths, strict=True):
        blocks = bias.view(num_blocks, width)
        missing = widest - width
        filled = F.pad(blocks, (0, missing))
        padded.append(filled.reshape(-1))
    return torch.stack(padded)


Segment = tuple[slice, slice, int]  # an expert's pairs, its rows, and its width
Operator = Callable[..., Tensor]
# One for each argument of an operator, of which only the first two have any.
Gradients = tuple[Tensor | None, Tensor | None, None, None, None]


def _segments(count_E1: Tensor, widths: Sequence[int], num_blocks: int) -> Iterator[Segment]:
    """The experts that have pairs and rows."""
    first_pair = 0
    first_row = 0
    # Not strict, because "none" has no width.
    for count, width in zip(count_E1.tolist(), widths, strict=False):
        num_rows = num_blocks * width
        pairs = slice(first_pair, first_pair + count)
        rows = slice(first_row, first_row + num_rows)
        first_pair = pairs.stop
        first_row = rows.stop
        if count and width:
            yield pairs, rows, width


def _own_entries(
    expanded_SP: Tensor, segments: Iterable[Segment], num_blocks: int, widest: int
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Each segment's pairs, its rows, and its pairs' entries for these rows, (n, G)."""
    expanded_SBF = expanded_SP.view(-1, num_blocks, widest)
    for pairs, rows, width in segments:
        own_nBF = expanded_SBF[pairs, :, :width]
        num_rows = num_blocks * width
        own_nG = own_nBF.reshape(-1, num_rows)
        yield pairs, rows, own_nG


def expand_segments(
    hidden_SD: Tensor,
    weight_RD: Tensor,
    count_E1: Tensor,
    widths: Sequence[int],
    num_blocks: int,
) -> Tensor:
    """Each pair times its own expert's rows, (S, P); zero beyond an expert's width."""
    num_pairs = len(hidden_SD)
    widest = max(widths)
    expanded_SBF = hidden_SD.new_zeros(num_pairs, num_blocks, widest)
    for pairs, rows, width in _segments(count_E1, widths, num_blocks):
        hidden_nD = hidden_SD[pairs]
        own_nG = F.linear(hidden_nD, weight_RD[rows])
        own_nBF = own_nG.view(-1, num_blocks, width)
        expanded_SBF[pairs, :, :width] = own_nBF
    return expanded_SBF.flatten(1)


def contract_segments(
    expanded_SP: Tensor,
    weight_RD: Tensor,
    count_E1: Tensor,
    widths: Sequence[int],
    num_blocks: int,
) -> Tensor:
    """The transpose of `expand_segments`: sum over an expert's rows of entry times row, (S, D)."""
    num_pairs = len(expanded_SP)
    model_width = weight_RD.shape[1]
    contracted_SD = expanded_SP.new_zeros(num_pairs, model_width)
    segments = _segments(count_E1, widths, num_blocks)
    for pairs, rows, own_nG in _own_entries(expanded_SP, segments, num_blocks, max(widths)):
        own_GD = weight_RD[rows]
        contracted_SD[pairs] = F.linear(own_nG, own_GD.T)
    return contracted_SD


def outer_segments(
    expanded_SP: Tensor,
    hidden_SD: Tensor,
    count_E1: Tensor,
    widths: Sequence[int],
    num_blocks: int,
) -> Tensor:
    """Sum over each expert's pairs of entry times hidden state, (R, D): both gradients for the weight."""
    num_rows = num_blocks * sum(widths)
    model_width = hidden_SD.shape[1]
    outer_RD = hidden_SD.new_zeros(num_rows, model_width)
    segments = _segments(count_E1, widths, num_blocks)
    for pairs, rows, own_nG in _own_entries(expanded_SP, segments, num_blocks, max(widths)):
        hidden_nD = hidden_SD[pairs]
        outer_RD[rows] = own_nG.T @ hidden_nD
    return outer_RD


def _expand_fake(*inputs: Any) -> Any:
    """A tensor of the shape of `expand_segments`' result, (S, P), for the same arguments.

    The data is not read, so it serves where there is none.
    """
    hidden_SD, _, _, widths, num_blocks = inputs
    num_pairs = hidden_SD.shape[0]
    num_columns = num_blocks * max(widths)
    return hidden_SD.new_empty(num_pairs, num_columns)


def _contract_fake(*inputs: Any) -> Any:
    """The same for `contract_segments`, (S, D)."""
    expanded_SP, weight_RD, *_ = inputs
    num_pairs = expanded_SP.shape[0]
    model_width = weight_RD.shape[1]
    return expanded_SP.new_empty(num_pairs, model_width)


def _outer_fake(*inputs: Any) -> Any:
    """The same for `outer_segments`, (R, D)."""
    _, hidden_SD, _, widths, num_blocks = inputs
    num_rows = num_blocks * sum(widths)
    model_width = hidden_SD.shape[1]
    return hidden_SD.new_empty(num_rows, model_width)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keep an operator's arguments for its backward pass."""
    *tensors, ctx.widths, ctx.num_blocks = inputs
    ctx.save_for_backward(*tensors)


def _expand_backward(ctx: Any, grad_SP: Tensor) -> Gradients:
    """dloss/dhidden and dloss/dweight from dloss/dexpanded, where they are asked for."""
    hidden_SD, weight_RD, count_E1 = ctx.saved_tensors
    rest = (count_E1, ctx.widths, ctx.num_blocks)
    needs_hidden, needs_weight, *_ = ctx.needs_input_grad
    grad_SP = grad_SP.contiguous()
    grad_SD = None
    grad_RD = None
    if needs_hidden:
        grad_SD = torch.ops.heapr.contract_segments(grad_SP, weight_RD, *rest)
    if needs_weight:
        grad_RD = torch.ops.heapr.outer_segments(grad_SP, hidden_SD, *rest)
    return grad_SD, grad_RD, None, None, None


def _contract_backward(ctx: Any, grad_SD: Tensor) -> Gradients:
    """dloss/dexpanded and dloss/dweight from dloss/dcontracted, where they are asked for."""
    expanded_SP, weight_RD, count_E1 = ctx.saved_tensors
    rest = (count_E1, ctx.widths, ctx.num_blocks)
    needs_expanded, needs_weight, *_ = ctx.needs_input_grad
    grad_SP = None
    grad_RD = None
    if needs_expanded:
        grad_SP = torch.ops.heapr.expand_segments(grad_SD, weight_RD, *rest)
    if needs_weight:
        grad_RD = torch.ops.heapr.outer_segments(expanded_SP, grad_SD, *rest)
    return grad_SP, grad_RD, None, None, None


def _define(function: Operator, fake: Operator, backward: Callable[..., Gradients] | None) -> None:
    """Make a function an operator of torch.ops.heapr, unless another copy of this file has done so."""
    name = function.__name__
    if hasattr(torch.ops.heapr, name):
        return
    operator = torch.library.custom_op(f"heapr::{name}", function, mutates_args=())
    operator.register_fake(fake)
    if backward is not None:
        operator.register_autograd(backward, setup_context=_remember)


# When the file is imported, because a model that was pickled or compiled needs them before it is called.
_define(expand_segments, _expand_fake, _expand_backward)
_define(contract_segments, _contract_fake, _contract_backward)
_define(outer_segments, _outer_fake, None)
