"""MoE layers one after the other: what flows into the experts of each, behind earlier layers that may have changed on the way.

In: a model and its batches of token ids. Out: for each MoE layer its `ExpertInputs`. Of a batch only the hidden states before
one decoder layer are kept, so that memory is that of one layer and every layer is run once.
Shape letters: T tokens of all batches, D model width, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from heapr.errors import ConfigError
from heapr.model.experts import ExpertsForward, forwards, use_heapr_experts
from heapr.model.moe import MoELayer, MoEModel
from heapr.model.ragged_experts import Experts, RaggedExperts, layout_of, routing_of, run_experts


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
def walk_layers(
    model: MoEModel, batches: Sequence[Tensor], *, follow_stream: bool = False
) -> Iterator[tuple[MoELayer, ExpertInputs, Tensor | None]]:
    """Every MoE layer in order, with what flows into its experts. A layer runs with the experts that it has when the next one is
    asked for, so that what a caller changed is seen by all later layers.

    Args:
        batches: int64 (N, W) token ids each.
        follow_stream: also yield what the layer's experts have to put out, biases of W_down aside, for the residual stream behind the
            layer to be what it is in the model that the walk began with (T, D), float32: that stream, walked through every layer before a
            caller changes it, less the present one without the experts. It takes one more pass through every layer, and one more hidden
            state of every token. Means something where experts' output is added to the stream as it is.

    Raises:
        FloatingPointError: an input is NaN or infinite; the message names the layer.
    """
    walker, unchanged = _Walker(model), _Walker(model)
    hidden: list[Tensor | None] = [None] * len(batches)
    stream: list[Tensor | None] = [None] * len(batches)
    for layer in model.layers:
        inputs, wanted = [], []
        for number, ids in enumerate(batches):
            ids_NW = ids.to(model.device)
            found, hidden[number], rest = walker.reach(layer, ids_NW, hidden[number], beyond=follow_stream)
            inputs.append(found)
            if rest is not None:
                stream[number] = behind = unchanged.behind(layer, ids_NW, stream[number])
                wanted.append((behind.float() - rest.float()).flatten(0, -2))
        walker.start, unchanged.start = layer.index, layer.index + 1
        yield layer, _joined(layer, inputs), torch.cat(wanted) if wanted else None


@torch.no_grad()
def check_stream(model: MoEModel) -> None:
    """Refuse models whose experts' output is not added to the residual stream as it is: `walk_layers` could not say what it lacks.

    Raises:
        ConfigError: naming the layer.
    """
    walker, ids_NW = _Walker(model), torch.arange(8, device=model.device).unsqueeze(0)
    hidden: Tensor | None = None
    for layer in model.layers:
        inputs, _, rest = walker.reach(layer, ids_NW, hidden, beyond=True)
        hidden = behind = walker.behind(layer, ids_NW, hidden)
        walker.start = layer.index + 1
        if rest is None or not _is_sum(behind.flatten(0, -2), rest.flatten(0, -2), layer.experts, inputs):
            raise ConfigError(
                f"pruning.repair.target=residual_stream: layer {layer.index} of {type(model.model).__name__} does not add its experts' "
                "output to the residual stream as it is, so it cannot be made up for there; give pruning.repair.target=layer_output"
            )


def _is_sum(behind_TD: Tensor, rest_TD: Tensor, experts: Experts, inputs: ExpertInputs) -> bool:
    """Whether the stream behind a layer is that without its experts and their output, up to rounding."""
    if layout_of(experts).weighs_input or behind_TD.shape != inputs.hidden_TD.shape:
        return False
    routed = (inputs.hidden_TD, inputs.expert_TK, inputs.router_weight_TK)
    output_TD = run_experts(experts, *routed).float() - run_experts(_emptied(experts), *routed).float()
    rounding_TD = 4 * torch.finfo(behind_TD.dtype).eps * behind_TD.float().abs() + 1e-2 * output_TD.abs().max()
    return bool(((behind_TD.float() - rest_TD.float() - output_TD).abs() <= rounding_TD).all())


class _Reached(Exception):  # noqa: N818 - not an error
    """What a pass was made for is there; nothing behind it is run."""


class _Walker:
    """Runs the decoder layers from `start` to the experts of a layer, or through its decoder layer. The model's own forward still prepares
    masks and positions, whatever the family needs; decoder layers before `start` pass their input through, for it is replaced there."""

    def __init__(self, model: MoEModel) -> None:
        self.model = model
        self.decoder = model.decoder_layers
        self.start = 0
        self._rest: dict[nn.Module, tuple[Any, ...] | None] = {}  # what a decoder layer returned behind the hidden states

    def reach(self, layer: MoELayer, ids_NW: Tensor, hidden: Tensor | None, *, beyond: bool) -> tuple[ExpertInputs, Tensor, Tensor | None]:
        """The inputs of a layer's experts, and the hidden states before its decoder layer and, if asked for, behind it without
        the experts, of one batch.

        Args:
            hidden: those before decoder layer `start`; none is those that the model starts from.
        """
        inputs: list[ExpertInputs] = []

        def reach(experts: Experts, hidden_TD: Tensor, *routing: Tensor) -> Tensor:
            inputs.append(_compact(experts, hidden_TD, *routing))
            if not beyond:
                raise _Reached
            return run_experts(_emptied(experts), hidden_TD, *routing)

        before, behind = self._run(layer, ids_NW, hidden, reach)
        return inputs[0], before, behind

    def behind(self, layer: MoELayer, ids_NW: Tensor, hidden: Tensor | None) -> Tensor:
        """The hidden states behind a layer's decoder layer."""
        _, behind = self._run(layer, ids_NW, hidden, run_experts)
        assert behind is not None
        return behind

    def _run(self, layer: MoELayer, ids_NW: Tensor, hidden: Tensor | None, run: ExpertsForward) -> tuple[Tensor, Tensor | None]:
        """Hidden states before the layer's decoder layer and behind it, with `run` in place of the layer's experts."""
        before: list[Tensor] = []
        behind: list[Tensor] = []

        def experts_forward(experts: Experts, hidden_TD: Tensor, *routing: Tensor) -> Tensor:
            return (run if experts is layer.experts else run_experts)(experts, hidden_TD, *routing)

        def leave(decoder: nn.Module, _: Any, output: Any) -> None:
            behind.append(output[0] if isinstance(output, tuple) else output)
            raise _Reached

        with ExitStack() as stack:
            stack.enter_context(use_heapr_experts(self.model.model, experts_forward))
            stack.enter_context(forwards(self.decoder[: self.start], self._pass_through))
            hooks = [decoder.register_forward_hook(self._remember) for decoder in self.decoder[self.start : layer.index + 1]]
            hooks.append(self.decoder[layer.index].register_forward_pre_hook(partial(_record, before), with_kwargs=True))
            hooks.append(self.decoder[layer.index].register_forward_hook(leave))
            if hidden is not None:  # before the hook that records, because both may be of one decoder layer
                give = partial(_give, hidden)
                hooks.append(self.decoder[self.start].register_forward_pre_hook(give, with_kwargs=True, prepend=True))
            for hook in hooks:
                stack.callback(hook.remove)
            with suppress(_Reached):
                self.model.body(input_ids=ids_NW, use_cache=False)
        assert before, f"decoder layer {layer.index} was not reached"
        return before[0], behind[0] if behind else None

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


def _emptied(experts: Experts) -> RaggedExperts:
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
