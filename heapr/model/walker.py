"""One batch on its way through the decoder layers: what flows into the experts of one layer after the other.

In: a model and token ids. Out: `ExpertInputs`, and hidden states before and behind a decoder layer.
Shape letters: T tokens, D model width, K experts per token, N sequences, W window.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from heapr.model.experts.dispatch import ExpertsForward, forwards, use_heapr_experts
from heapr.model.experts.layout import Experts, layout_of, routing_of
from heapr.model.experts.loop import run_experts
from heapr.model.experts.ragged import RaggedExperts
from heapr.model.moe import MoELayer, MoEModel


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

    def weighted(self, weight_T: Tensor) -> ExpertInputs:
        """The same where each token's errors count weight^2 times: whatever experts put out goes with p."""
        return replace(self, router_weight_TK=self.router_weight_TK.float() * weight_T.unsqueeze(1))

    def pairs(self, expert: int) -> tuple[Tensor, Tensor]:
        """The n tokens of an expert, and their router weights."""
        token_n, choice_n = torch.where(self.expert_TK == expert)
        return token_n, self.router_weight_TK[token_n, choice_n]


class _Reached(Exception):  # noqa: N818 - not an error
    """What a pass was made for is there; nothing behind it is run."""


class Walker:
    """One batch on its way through the decoder layers. The model's own forward still prepares masks and positions, whatever the
    family needs; decoder layers before `start` pass their input through, for it is replaced there.

    Args:
        ids_NW: token ids.
    """

    def __init__(self, model: MoEModel, ids_NW: Tensor) -> None:
        self.model, self.ids_NW = model, ids_NW
        self.decoder = model.decoder_layers
        self.start = 0
        self.hidden: Tensor | None = None  # hidden states before decoder layer `start`; none is those that the model starts from
        self._other_outputs: dict[nn.Module, tuple[Any, ...] | None] = {}  # what a decoder layer returned behind its hidden states

    def reach(self, layer: MoELayer, *, beyond: bool) -> tuple[ExpertInputs, Tensor | None]:
        """Go before a layer's decoder layer; the inputs of its experts and, `beyond`, the hidden states behind it without them."""
        inputs: list[ExpertInputs] = []

        def take_inputs(experts: Experts, hidden_TD: Tensor, *routing: Tensor) -> Tensor:
            inputs.append(_compact(experts, hidden_TD, *routing))
            if not beyond:
                raise _Reached
            return run_experts(emptied(experts), hidden_TD, *routing)

        self.hidden, without = self._run(layer, take_inputs)
        self.start = layer.index
        assert len(inputs) == 1, f"the experts of layer {layer.index} ran {len(inputs)} times"
        return inputs[0], without

    def leave(self, layer: MoELayer) -> Tensor:
        """Go behind a layer's decoder layer; the hidden states there."""
        _, behind = self._run(layer, run_experts)
        assert behind is not None
        self.hidden, self.start = behind, layer.index + 1
        return behind

    def _run(self, layer: MoELayer, run: ExpertsForward) -> tuple[Tensor, Tensor | None]:
        """Hidden states before the layer's decoder layer and behind it, with `run` in place of the layer's experts."""
        before: list[Tensor] = []
        behind: list[Tensor] = []

        def experts_forward(experts: Experts, hidden_TD: Tensor, *routing: Tensor) -> Tensor:
            return (run if experts is layer.experts else run_experts)(experts, hidden_TD, *routing)

        def stop(_: nn.Module, __: Any, output: Any) -> None:
            behind.append(output[0] if isinstance(output, tuple) else output)
            raise _Reached

        with ExitStack() as stack:
            stack.enter_context(use_heapr_experts(self.model.model, experts_forward))
            stack.enter_context(forwards(self.decoder[: self.start], self._pass_through))
            hooks = [decoder.register_forward_hook(self._remember) for decoder in self.decoder[self.start : layer.index + 1]]
            hooks.append(self.decoder[layer.index].register_forward_pre_hook(partial(_record, before), with_kwargs=True))
            hooks.append(self.decoder[layer.index].register_forward_hook(stop))
            if self.hidden is not None:  # before the hook that records, because both may be of one decoder layer
                give = partial(_give, self.hidden)
                hooks.append(self.decoder[self.start].register_forward_pre_hook(give, with_kwargs=True, prepend=True))
            for hook in hooks:
                stack.callback(hook.remove)
            with suppress(_Reached):
                self.model.body(input_ids=self.ids_NW, use_cache=False)
        assert before, f"decoder layer {layer.index} was not reached"
        return before[0], behind[0] if behind else None

    def _remember(self, decoder: nn.Module, _: Any, output: Any) -> None:
        self._other_outputs[decoder] = tuple(output[1:]) if isinstance(output, tuple) else None

    def _pass_through(self, decoder: nn.Module) -> Callable[..., Any]:
        others = self._other_outputs[decoder]

        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            return hidden if others is None else (hidden, *others)

        return forward


def _record(before: list[Tensor], _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    before.append(args[0] if args else kwargs["hidden_states"])


def _give(hidden: Tensor, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments with other hidden states."""
    return ((hidden, *args[1:]), kwargs) if args else ((), kwargs | {"hidden_states": hidden})


def emptied(experts: Experts) -> RaggedExperts:
    """The same experts without atomic experts: what they put out is the biases of W_down, where a family has them."""
    empty = RaggedExperts(experts, [0] * experts.num_experts)
    if layout_of(experts).has_bias:
        empty.down_proj_bias.copy_(experts.down_proj_bias)
    return empty


def _compact(experts: Experts, hidden_TD: Tensor, *routing: Tensor) -> ExpertInputs:
    """Inputs with their routing; of a family that weighs the input only the rows that were routed, one token each."""
    expert_TK, router_weight_TK = routing_of(experts, hidden_TD, *routing)
    if layout_of(experts).weighs_input:
        routed_T = expert_TK.squeeze(1) < experts.num_experts
        hidden_TD, expert_TK, router_weight_TK = hidden_TD[routed_T], expert_TK[routed_T], router_weight_TK[routed_T]
    return ExpertInputs(hidden_TD, expert_TK, router_weight_TK)
