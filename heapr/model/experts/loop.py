"""The experts' forward, one expert after the other: the reference for every other forward, and the CPU's way.

It reads the number of tokens of each expert on the host, so on a GPU it waits for the device once per layer.
This file is copied beside pruned checkpoints and loaded where heapr is not installed: it imports torch alone.
Shape letters: layout.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import Experts, Matrices, activation_of, layout_of, matrices_of, routing_of, widths_of


class Visit(NamedTuple):
    """One expert and the tokens routed to it.

    Attributes:
        matrices: the expert's weights.
        token_n: the tokens' positions.
        hidden_nD: the tokens.
        router_weight_n: their router weights p.
    """

    matrices: Matrices
    token_n: Tensor
    hidden_nD: Tensor
    router_weight_n: Tensor

    def h(self, activation: Callable[[Tensor], Tensor]) -> Tensor:
        """h = activation(inputs x + inputs_bias), (n, F)."""
        return activation(F.linear(self.hidden_nD, self.matrices.inputs_GD, self.matrices.inputs_bias_G))

    def output(self, h_nF: Tensor) -> Tensor:
        """E(x) = down h + down_bias, (n, D)."""
        return F.linear(h_nF, self.matrices.down_DF, self.matrices.down_bias_D)


def run_experts(experts: Experts, hidden_TD: Tensor, *routing: Tensor) -> Tensor:
    """Sum over each token's experts of p * E(x), with E(x) = W_down h(x) (docs/method.md, 1).

    Args:
        experts: dense or ragged.
        hidden_TD: the tokens. Families that weigh the input pass (E*T, D) instead: all tokens times their
            router weight, once for each expert, with zeros where a token was not routed to it. The result
            then has this shape too.
        routing: expert_TK and router_weight_TK; nothing in families that weigh the input. Expert number E
            stands for no expert.
    """
    expert_TK, router_weight_TK = routing_of(experts, hidden_TD, *routing)
    return run_sorted(experts, hidden_TD, expert_TK, router_weight_TK, counts=counts_of(experts, expert_TK))


def counts_of(experts: Experts, expert_TK: Tensor) -> list[int]:
    """Number of (token, expert) pairs of each expert and, last, of pairs without an expert: E+1 numbers."""
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
    """Run the experts on (token, expert) pairs sorted by expert.

    Each expert's tokens are then one contiguous segment.

    Args:
        counts: number of pairs of each expert and, last, of pairs without an expert.
        matrices_E: every expert's weights; None takes the module's own.

    Returns:
        the sum over each token's experts of p * E(x), in the shape of `hidden_TD`.
    """
    order_S = torch.sort(expert_TK.reshape(-1), stable=True).indices
    widths = widths_of(experts)
    is_observed = getattr(experts, "observer", None) is not None
    if not is_observed and not layout_of(experts).has_bias and 0 in widths:
        order_S, counts = _without_empty(order_S, counts, widths)
    token_S = order_S // expert_TK.shape[1]
    hidden_SD = hidden_TD[token_S]
    router_weight_S = router_weight_TK.reshape(-1)[order_S]
    if matrices_E is None:
        matrices_E = matrices_of(experts)
    # Not strict: the last segment is that of the pairs without an expert.
    segments = zip(
        matrices_E,
        token_S.split(counts),
        hidden_SD.split(counts),
        router_weight_S.split(counts),
        strict=False,
    )
    # A generator, because matrices may be copies, made one at a time.
    all_visits = (Visit(*segment) for segment in segments)
    visits = (visit for visit in all_visits if len(visit.token_n))
    outputs = _observed(experts, list(visits), counts) if is_observed else _one_by_one(experts, visits)
    total_TD = torch.zeros_like(hidden_TD)
    for visit, output_nD in outputs:
        weighted_nD = output_nD * visit.router_weight_n.unsqueeze(-1)
        # A token visits an expert once, so no index repeats: the order of additions is the same on every
        # device and in every run.
        total_TD.index_add_(0, visit.token_n, weighted_nD.to(total_TD.dtype))
    return total_TD


def split_by_expert(rows_S: Tensor, offsets: Tensor) -> tuple[Tensor, ...]:
    """Each expert's rows.

    Args:
        rows_S: one row for each (token, expert) pair, sorted by expert.
        offsets: (E+1,), on the CPU, as the loop passes them to observers.
    """
    of_experts: tuple[Tensor, ...] = rows_S.split(offsets.diff().tolist())
    return of_experts


def _one_by_one(experts: Experts, visits: Iterable[Visit]) -> Iterator[tuple[Visit, Tensor]]:
    """Outputs (n, D), each computed when it is asked for."""
    activation = activation_of(experts)
    for visit in visits:
        h_nF = visit.h(activation)
        yield visit, visit.output(h_nF)


def _observed(experts: Experts, visits: Sequence[Visit], counts: list[int]) -> Iterator[tuple[Visit, Tensor]]:
    """The same outputs, computed all at once and shown to the layer's observer as one tensor."""
    if not visits:
        return
    activation = activation_of(experts)
    width = max(widths_of(experts))
    h_E = [_padded(visit.h(activation), width) for visit in visits]
    h_SF = torch.cat(h_E)
    del h_E
    sizes = [len(visit.token_n) for visit in visits]
    output_E = []
    for visit, h_nF in zip(visits, h_SF.split(sizes), strict=True):
        own_width = visit.matrices.down_DF.shape[1]
        output_E.append(visit.output(h_nF[:, :own_width]))
    output_SD = torch.cat(output_E)
    del output_E
    router_weight_E = [visit.router_weight_n for visit in visits]
    starts = list(accumulate(counts[:-1], initial=0))
    offsets = torch.tensor(starts, device="cpu")
    experts.observer(h_SF, torch.cat(router_weight_E), output_SD, offsets)
    yield from zip(visits, output_SD.split(sizes), strict=True)


def _padded(h_nF: Tensor, width: int) -> Tensor:
    """Activations with columns of zeros appended, `width` columns in all."""
    missing = width - h_nF.shape[1]
    return F.pad(h_nF, (0, missing)) if missing else h_nF


def _without_empty(order_S: Tensor, counts: list[int], widths: list[int]) -> tuple[Tensor, list[int]]:
    """Drop the pairs of experts of width 0 and those without an expert, which contribute nothing.

    Their tokens need not even be gathered. There is still one count per segment.
    """
    kept = [order_S[:0]]
    kept_counts = []
    for segment_n, width in zip(order_S.split(counts), [*widths, 0], strict=True):
        if width:
            kept.append(segment_n)
        kept_counts.append(len(segment_n) if width else 0)
    return torch.cat(kept), kept_counts
