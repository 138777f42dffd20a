"""MoE layers one after the other: what flows into the experts of each, behind earlier layers that may have changed on the way.

In: a model and its batches of token ids. Out: for each MoE layer its `ExpertInputs`. Of a batch only the hidden states before
one decoder layer are kept, so that memory is that of one layer and every layer is run once.
Shape letters: T tokens of all batches, D model width, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from heapr.model.experts import forwards, use_heapr_experts
from heapr.model.moe import MoELayer, MoEModel
from heapr.model.ragged_experts import Experts, layout_of, routing_of, run_experts


@dataclass(frozen=True)
class ExpertInputs:
    """What flows into a layer's experts.

    Attributes:
        hidden_TD: the tokens. Of a family that weighs the input: one row for each pair of a token and an expert, weighted.
        expert_TK: experts of each token; expert number E means none.
        router_weight_TK: their router weights p.
    """

    hidden_TD: Tensor
    expert_TK: Tensor
    router_weight_TK: Tensor

    def __post_init__(self) -> None:
        assert self.expert_TK.shape == self.router_weight_TK.shape and len(self.expert_TK) == len(self.hidden_TD)

    def pairs(self, expert: int) -> tuple[Tensor, Tensor]:
        """The n tokens of an expert, and their router weights."""
        token_n, choice_n = torch.where(self.expert_TK == expert)
        return token_n, self.router_weight_TK[token_n, choice_n]


@torch.no_grad()
def walk_layers(model: MoEModel, batches: Sequence[Tensor]) -> Iterator[tuple[MoELayer, ExpertInputs]]:
    """Every MoE layer in order, with what flows into its experts. A layer runs with the experts that it has when the next one is
    asked for, so that what a caller changed is seen by all later layers.

    Args:
        batches: int64 (N, W) token ids each.

    Raises:
        FloatingPointError: an input is NaN or infinite; the message names the layer.
    """
    walker = _Walker(model)
    hidden: list[Tensor | None] = [None] * len(batches)
    for layer in model.layers:
        inputs = []
        for number, ids_NW in enumerate(batches):
            hidden[number], found = walker.run(layer, ids_NW.to(model.device), hidden[number])
            inputs.append(found)
        walker.start = layer.index
        yield layer, _joined(layer, inputs)


class _Reached(Exception):  # noqa: N818 - not an error
    """The experts that a pass was made for have their input; nothing behind them is run."""

    def __init__(self, inputs: ExpertInputs) -> None:
        super().__init__()
        self.inputs = inputs


class _Walker:
    """Runs the decoder layers from `start` to the experts of a layer. The model's own forward still prepares masks and positions,
    whatever the family needs; decoder layers before `start` pass their input through, for it is replaced there."""

    def __init__(self, model: MoEModel) -> None:
        self.model = model
        self.decoder = model.decoder_layers
        self.start = 0
        self._rest: dict[nn.Module, tuple[Any, ...] | None] = {}  # what a decoder layer returned behind the hidden states

    def run(self, layer: MoELayer, ids_NW: Tensor, hidden: Tensor | None) -> tuple[Tensor, ExpertInputs]:
        """Hidden states before the layer's decoder layer, and its experts' inputs, of one batch.

        Args:
            hidden: those before decoder layer `start`; none is those that the model starts from.
        """
        before: list[Tensor] = []

        def reach(experts: Experts, hidden_TD: Tensor, *routing: Tensor) -> Tensor:
            if experts is layer.experts:
                raise _Reached(_compact(experts, hidden_TD, *routing))
            return run_experts(experts, hidden_TD, *routing)

        with ExitStack() as stack:
            stack.enter_context(use_heapr_experts(self.model.model, reach))
            stack.enter_context(forwards(self.decoder[: self.start], self._pass_through))
            hooks = [decoder.register_forward_hook(self._remember) for decoder in self.decoder[self.start : layer.index]]
            hooks.append(self.decoder[layer.index].register_forward_pre_hook(partial(_record, before), with_kwargs=True))
            if hidden is not None:  # before the hook that records, because both may be of one decoder layer
                give = partial(_give, hidden)
                hooks.append(self.decoder[self.start].register_forward_pre_hook(give, with_kwargs=True, prepend=True))
            for hook in hooks:
                stack.callback(hook.remove)
            try:
                self.model.body(input_ids=ids_NW, use_cache=False)
            except _Reached as reached:
                return before[0], reached.inputs
        raise AssertionError(f"the experts of layer {layer.index} were not reached")

    def _remember(self, decoder: nn.Module, _: Any, output: Any) -> None:
        self._rest[decoder] = tuple(output[1:]) if isinstance(output, tuple) else None

    def _pass_through(self, decoder: nn.Module) -> Callable[..., Any]:
        rest = self._rest[decoder]

        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            return hidden if rest is None else (hidden, *rest)

        return forward


def _record(before: list[Tensor], _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    before.append(args[0] if args else kwargs["hidden_states"])


def _give(hidden: Tensor, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments with other hidden states."""
    return ((hidden, *args[1:]), kwargs) if args else ((), kwargs | {"hidden_states": hidden})


def _compact(experts: Experts, hidden_TD: Tensor, *routing: Tensor) -> ExpertInputs:
    """Inputs with their routing; of a family that weighs the input only the rows that were routed, one token each."""
    expert_TK, router_weight_TK = routing_of(experts, hidden_TD, *routing)
    if layout_of(experts).weighs_input:
        routed_T = expert_TK.squeeze(1) < experts.num_experts
        hidden_TD, expert_TK, router_weight_TK = hidden_TD[routed_T], expert_TK[routed_T], router_weight_TK[routed_T]
    return ExpertInputs(hidden_TD, expert_TK, router_weight_TK)


def _joined(layer: MoELayer, inputs: Sequence[ExpertInputs]) -> ExpertInputs:
    """The inputs of all batches as one.

    Raises:
        FloatingPointError: NaN or infinity.
    """
    hidden_TD = torch.cat([part.hidden_TD for part in inputs])
    if not hidden_TD.isfinite().all():
        raise FloatingPointError(
            f"repair: an input of layer {layer.index}'s experts is NaN or infinite; use a wider model.dtype, or look at weights and text"
        )
    expert_TK, router_weight_TK = (torch.cat([getattr(part, name) for part in inputs]) for name in ("expert_TK", "router_weight_TK"))
    return ExpertInputs(hidden_TD, expert_TK, router_weight_TK)
