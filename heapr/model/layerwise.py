"""MoE layers one after the other: what flows into the experts of each, behind earlier layers that may have changed on the way.

In: a model and its batches of token ids. Out: for each MoE layer its `ExpertInputs` and, if asked for, a `StreamTarget`. Of a batch
only the hidden states before one decoder layer are kept, so that memory is that of one layer.
Shape letters: T tokens of all batches, D model width, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from heapr.errors import ConfigError
from heapr.model.experts import ExpertsForward, forwards, use_heapr_experts
from heapr.model.moe import MoELayer, MoEModel
from heapr.model.ragged_experts import Experts, RaggedExperts, layout_of, routing_of, run_experts

NORM_EPS = 1e-6  # what families' norms add before they divide by the root of a mean square


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


@dataclass(frozen=True)
class StreamTarget:
    """What brings the residual stream behind a layer to where it was.

    Attributes:
        output_TD: what the layer's experts have to put out, before the layer scales it, biases of W_down aside; float32.
        weight_T: 1 over the root mean square of the stream, by which later layers divide it before they read it; float32.
    """

    output_TD: Tensor
    weight_T: Tensor


@torch.no_grad()
def walk_layers(
    model: MoEModel, batches: Sequence[Tensor], *, follow_stream: bool = False
) -> Iterator[tuple[MoELayer, ExpertInputs, StreamTarget | None]]:
    """Every MoE layer in order, with what flows into its experts. A layer runs with the experts that it has when the next one is
    asked for, so that what a caller changed is seen by all later layers.

    Args:
        batches: int64 (N, W) token ids each.
        follow_stream: also yield what brings the stream behind the layer to where it is in the model that the walk began with: that
            stream, walked through every layer before a caller changes it, less the present one without the layer's experts
            (docs/method.md, 21). Every layer then runs three times, and one more hidden state of every token is held.

    Raises:
        ConfigError: the stream is asked for, and the model does not pass `check_stream`.
        FloatingPointError: an input is NaN or infinite; the message names the layer.
    """
    walkers, originals = ([_Walker(model, ids_NW.to(model.device)) for ids_NW in batches] for _ in range(2))
    few = _few_tokens(model)
    for layer in model.layers:
        parts, targets, scale = [], [], _scale(layer, few) if follow_stream else 1.0
        for walker, original in zip(walkers, originals, strict=True):
            part, without = walker.reach(layer, beyond=follow_stream)
            parts.append(part)
            if without is not None:
                stream_TD = original.leave(layer).float().flatten(0, -2)
                weight_T = stream_TD.square().mean(1).clamp(min=NORM_EPS).rsqrt()
                targets.append(((stream_TD - without.float().flatten(0, -2)) / scale, weight_T))
        inputs = _joined(layer, parts)
        target = StreamTarget(*map(torch.cat, zip(*targets, strict=True))) if targets else None
        del parts, targets  # a generator holds its variables while the caller is at work
        yield layer, inputs, target
        del inputs, target


@torch.no_grad()
def check_stream(model: MoEModel) -> None:
    """Refuse models of which `walk_layers` could not say what the residual stream lacks.

    Raises:
        ConfigError: naming the layer and why.
    """
    few = _few_tokens(model)
    for layer in model.layers:
        _scale(layer, few)


def _scale(layer: MoELayer, few: _Walker) -> float:
    """By what a layer multiplies its experts' output when it adds it to the residual stream: 1 in most families.

    Args:
        few: some tokens before the layer in the model as it was; they go behind it.

    Raises:
        ConfigError: the output goes into the stream in another way.
    """
    inputs, without = few.reach(layer, beyond=True)
    before, behind = few.hidden, few.leave(layer)
    assert before is not None and without is not None
    scale = None
    if layout_of(layer.experts).weighs_input:
        why = "weighs its experts' inputs in place of their outputs"
    elif behind.flatten(0, -2).shape != inputs.hidden_TD.shape:
        why = "has several residual streams"
    else:
        why = "does not just add its experts' output to the residual stream"
        scale = _scale_of_sum(layer.experts, inputs, *(stream.flatten(0, -2).float() for stream in (before, without, behind)))
    if scale is None:
        raise ConfigError(
            f"pruning.repair.target=residual_stream: layer {layer.index} of {type(few.model.model).__name__} {why}, so it cannot bring "
            "the stream back; give pruning.repair.target=layer_output"
        )
    return scale


def _scale_of_sum(experts: Experts, inputs: ExpertInputs, before_TD: Tensor, without_TD: Tensor, behind_TD: Tensor) -> float | None:
    """The number that makes the stream behind a layer the one without its experts and so many times their output, up to rounding where
    the streams are largest; None if there is none."""
    routed = (inputs.hidden_TD, inputs.expert_TK, inputs.router_weight_TK)
    output_TD = run_experts(experts, *routed).float() - run_experts(_emptied(experts), *routed).float()
    added_TD, largest_TD = behind_TD - without_TD, torch.stack([before_TD, without_TD, behind_TD]).abs().amax(0)
    rounding_TD = 4 * torch.finfo(inputs.hidden_TD.dtype).eps * largest_TD + 1e-2 * added_TD.abs().mean()
    weighted_TD = output_TD / rounding_TD.clamp(min=1e-12).square()
    together, alone = (float((weighted_TD * other_TD).sum()) for other_TD in (added_TD, output_TD))
    scale = 1.0 if abs(together - alone) <= 0.01 * alone else together / alone  # 1 where all of it is zero
    error_TD = (added_TD - scale * output_TD).abs()
    return None if (error_TD > rounding_TD + 1e-2 * added_TD.abs().max()).any() else scale  # NaN passes, calibration will name it


def _few_tokens(model: MoEModel) -> _Walker:
    return _Walker(model, torch.arange(8, device=model.device).unsqueeze(0))


class _Reached(Exception):  # noqa: N818 - not an error
    """What a pass was made for is there; nothing behind it is run."""


class _Walker:
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
            return run_experts(_emptied(experts), hidden_TD, *routing)

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
