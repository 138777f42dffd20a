"""The experts' forward: one function for dense and ragged experts, with an optional observer of what flows through.

In: hidden states, and the router's choice of experts and weights. Out: the weighted sum of the chosen experts' outputs.
`use_heapr_experts` makes transformers call it under the name "heapr", so that one file serves every family.
Equations are numbered as in docs/method.md.
Shape letters: T tokens, D model width, E experts, F atomic experts of an expert, K experts per token, S = T*K
(token, expert) pairs sorted by expert, n tokens of one expert.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from heapr.errors import ConfigError

IMPLEMENTATION = "heapr"

Experts = Any  # an experts module of transformers or RaggedExperts; nn.Module does not declare what they share


class ExpertObserver(Protocol):
    """Sees each expert's intermediate activations as they are computed."""

    def __call__(self, expert: int, h_nF: Tensor, router_weight_n: Tensor, output_nD: Tensor) -> None: ...


class RaggedExperts(nn.Module):
    """Experts of individual widths, one layer: what is left of dense experts after pruning.

    Atomic experts are packed as rows, expert after expert. With R the number of atomic experts kept in the layer and
    expert e owning the rows [start_e, end_e):

        gate_up_proj (2R, D): rows 2*start_e .. 2*end_e are [W_gate of e; W_up of e]
        down_proj (R, D): rows start_e .. end_e are the columns w_k of e's W_down

    An expert of width 0 contributes zero. The router is not touched.
    """

    def __init__(self, gate_up_proj: Tensor, down_proj: Tensor, *, widths: Sequence[int], act_fn: nn.Module) -> None:
        super().__init__()
        assert down_proj.shape[0] == sum(widths) and gate_up_proj.shape == (2 * sum(widths), down_proj.shape[1])
        self.gate_up_proj = nn.Parameter(gate_up_proj)
        self.down_proj = nn.Parameter(down_proj)
        self.widths = tuple(widths)
        self.num_experts = len(self.widths)
        self.act_fn = act_fn
        self.observer: ExpertObserver | None = None

    def forward(self, hidden_TD: Tensor, expert_TK: Tensor, router_weight_TK: Tensor) -> Tensor:
        gate_up = self.gate_up_proj.split([2 * width for width in self.widths])
        down = [rows.T for rows in self.down_proj.split(self.widths)]
        return _run(self, hidden_TD, expert_TK, router_weight_TK, weights=zip(gate_up, down, strict=True))


def dense_experts_forward(experts: Experts, hidden_TD: Tensor, expert_TK: Tensor, router_weight_TK: Tensor) -> Tensor:
    """Forward of a transformers experts module: gate_up_proj (E, 2F, D), down_proj (E, D, F)."""
    weights = zip(experts.gate_up_proj, experts.down_proj, strict=True)
    return _run(experts, hidden_TD, expert_TK, router_weight_TK, weights=weights)


def _run(
    experts: Experts, hidden_TD: Tensor, expert_TK: Tensor, router_weight_TK: Tensor, *, weights: Iterable[tuple[Tensor, Tensor]]
) -> Tensor:
    """Sum over each token's experts of p * E(x), with E(x) = W_down h(x) (docs/method.md, 1).

    The (token, expert) pairs are sorted by expert, so that each expert's tokens are one contiguous segment.
    """
    flat_S = expert_TK.reshape(-1)
    order_S = torch.sort(flat_S, stable=True).indices
    counts = torch.bincount(flat_S, minlength=experts.num_experts).tolist()
    token_S = order_S // expert_TK.shape[1]
    segments = zip(
        token_S.split(counts), hidden_TD[token_S].split(counts), router_weight_TK.reshape(-1)[order_S].split(counts), strict=True
    )
    observer = getattr(experts, "observer", None)
    total_TD = torch.zeros_like(hidden_TD)
    for expert, ((gate_up_FD, down_DF), (token_n, hidden_nD, router_weight_n)) in enumerate(zip(weights, segments, strict=True)):
        if len(token_n) == 0:
            continue
        gate_nF, up_nF = F.linear(hidden_nD, gate_up_FD).chunk(2, dim=-1)
        h_nF = experts.act_fn(gate_nF) * up_nF
        output_nD = F.linear(h_nF, down_DF)
        if observer is not None:
            observer(expert, h_nF, router_weight_n, output_nD)
        # A token visits an expert once, so no index repeats: the order of additions is the same on every device and in every run.
        total_TD.index_add_(0, token_n, (output_nD * router_weight_n.unsqueeze(-1)).to(total_TD.dtype))
    return total_TD


@contextmanager
def use_heapr_experts(model: PreTrainedModel) -> Iterator[None]:
    """Select the forward above for every experts module of the model; restores the previous one.

    Raises:
        ConfigError: transformers does not let the model's experts implementation be chosen, which it passes over in silence.
    """
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, dense_experts_forward)
    previous = model.get_experts_implementation()
    model.set_experts_implementation(IMPLEMENTATION)
    if IMPLEMENTATION not in model.get_experts_implementation().values():
        raise ConfigError(f"{type(model).__name__} needs a missing capability: experts whose implementation cannot be chosen")
    try:
        yield
    finally:
        model.set_experts_implementation(previous)


@contextmanager
def observe_experts(model: PreTrainedModel, observers: Sequence[tuple[Experts, ExpertObserver]]) -> Iterator[None]:
    """Let each observer see what flows through its experts module; the model's outputs do not change. Restores."""
    with use_heapr_experts(model):
        for experts, observer in observers:
            experts.observer = observer
        try:
            yield
        finally:
            for experts, _ in observers:
                experts.observer = None
