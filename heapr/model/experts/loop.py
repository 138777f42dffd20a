"""The experts' forward, one expert after the other: the reference for every other forward, and the CPU's way.

It reads the numbers of tokens on the host: on a GPU it waits for the device once per layer.
Copied beside pruned checkpoints and loaded where heapr is not installed: it imports torch alone. Shape
letters: layout.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import Experts, Matrices, activation_of, layout_of, matrices_of, routing_of, widths_of


class Visit(NamedTuple):
    """An expert that tokens were routed to, and they."""

    matrices: Matrices
    token_n: Tensor
    hidden_nD: Tensor
    router_weight_n: Tensor


def run_experts(experts: Experts, hidden_TD: Tensor, *routing: Tensor) -> Tensor:
    """Sum over each token's experts of p * E(x), with E(x) = W_down h(x) (docs/method.md, 1).

    Args:
        experts: dense or ragged.
        hidden_TD: the tokens. Of a family that weighs the input: (E*T, D), for every expert all tokens times
            their router weight, zero where a token was not routed to it; the result then has this shape too.
        routing: expert_TK and router_weight_TK; nothing for a family that weighs the input. Expert number E
            means none.
    """
    expert_TK, router_weight_TK = routing_of(experts, hidden_TD, *routing)
    return run_sorted(experts, hidden_TD, expert_TK, router_weight_TK, counts=counts_of(experts, expert_TK))


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
    """The (token, expert) pairs are sorted by expert, so that each expert's tokens are one contiguous
    segment.

    Args:
        counts: pairs of every expert, and of none.
        matrices_E: every expert's weights; None takes the module's own.
    """
    order_S = torch.sort(expert_TK.reshape(-1), stable=True).indices
    is_observed = getattr(experts, "observer", None) is not None
    if not is_observed and not layout_of(experts).has_bias and 0 in widths_of(experts):
        order_S, counts = _without_empty(order_S, counts, widths_of(experts))
    token_S = order_S // expert_TK.shape[1]
    router_weight_S = router_weight_TK.reshape(-1)[order_S]
    segments = zip(
        token_S.split(counts), hidden_TD[token_S].split(counts), router_weight_S.split(counts), strict=True
    )
    visits = _visits(matrices_of(experts) if matrices_E is None else matrices_E, segments)
    outputs = _observed(experts, list(visits), counts[:-1]) if is_observed else _one_by_one(experts, visits)
    total_TD = torch.zeros_like(hidden_TD)
    for visit, output_nD in outputs:
        weighted_nD = output_nD * visit.router_weight_n.unsqueeze(-1)
        # A token visits an expert once, so no index repeats: the order of additions is the same on every
        # device and in every run.
        total_TD.index_add_(0, visit.token_n, weighted_nD.to(total_TD.dtype))
    return total_TD


def split_by_expert(rows_S: Tensor, offsets: Tensor) -> tuple[Tensor, ...]:
    """Each expert's rows; `offsets` (E+1,) as observers get them from the loop, on the CPU."""
    of_experts: tuple[Tensor, ...] = rows_S.split(offsets.diff().tolist())
    return of_experts


def _visits(
    matrices_E: Iterable[Matrices], segments: Iterable[tuple[Tensor, Tensor, Tensor]]
) -> Iterator[Visit]:
    """The experts that have tokens; the segment behind the last expert's is that of pairs without an
    expert."""
    for matrices, (token_n, hidden_nD, router_weight_n) in zip(matrices_E, segments, strict=False):
        if len(token_n):
            yield Visit(matrices, token_n, hidden_nD, router_weight_n)


def _one_by_one(experts: Experts, visits: Iterable[Visit]) -> Iterator[tuple[Visit, Tensor]]:
    """Outputs (n, D), each computed when it is asked for."""
    activation = activation_of(experts)
    for visit in visits:
        h_nF = activation(F.linear(visit.hidden_nD, visit.matrices.inputs_GD, visit.matrices.inputs_bias_G))
        yield visit, F.linear(h_nF, visit.matrices.down_DF, visit.matrices.down_bias_D)


def _observed(experts: Experts, visits: Sequence[Visit], counts: list[int]) -> Iterator[tuple[Visit, Tensor]]:
    """The same after the layer's observer has seen all of them: activations and outputs lie in one tensor
    each."""
    if not visits:
        return
    activation, width = activation_of(experts), max(widths_of(experts))
    h_E = [
        activation(F.linear(visit.hidden_nD, visit.matrices.inputs_GD, visit.matrices.inputs_bias_G))
        for visit in visits
    ]
    sizes = [len(h_nF) for h_nF in h_E]
    h_SF = torch.cat([_padded(h_nF, width) for h_nF in h_E])
    h_E = list(h_SF.split(sizes))
    output_E = []
    for visit, h_nF in zip(visits, h_E, strict=True):
        down_DF = visit.matrices.down_DF
        output_E.append(F.linear(h_nF[:, : down_DF.shape[1]], down_DF, visit.matrices.down_bias_D))
    output_SD = torch.cat(output_E)
    del output_E
    router_weight_S = torch.cat([visit.router_weight_n for visit in visits])
    offsets = torch.tensor(list(accumulate(counts, initial=0)), device="cpu")
    experts.observer(h_SF, router_weight_S, output_SD, offsets)
    yield from zip(visits, output_SD.split(sizes), strict=True)


def _padded(h_nF: Tensor, width: int) -> Tensor:
    """With columns of zeros up to a width."""
    missing = width - h_nF.shape[1]
    return F.pad(h_nF, (0, missing)) if missing else h_nF


def _without_empty(order_S: Tensor, counts: list[int], widths: list[int]) -> tuple[Tensor, list[int]]:
    """Pairs and their numbers without those of experts of width 0, which contribute nothing: their tokens are
    not even gathered."""
    has_work = [width > 0 for width in widths] + [False]
    kept = [segment_n for segment_n, works in zip(order_S.split(counts), has_work, strict=True) if works]
    return torch.cat(kept) if kept else order_S[:0], [
        count if works else 0 for count, works in zip(counts, has_work, strict=True)
    ]
