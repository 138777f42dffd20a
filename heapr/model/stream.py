"""The residual stream: what a layer's experts have to put out to bring it back to where it was, and which
models let them.

In: hidden states behind a decoder layer, in the model as it was and now without the layer's experts. Out: a
`StreamTarget` (docs/method.md, 21).
Shape letters: T tokens, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from heapr.errors import ConfigError
from heapr.model.expert_inputs import ExpertInputs, without_atomic_experts, without_experts
from heapr.model.experts.layout import Experts, layout_of
from heapr.model.experts.loop import run_experts
from heapr.model.moe import MoELayer, MoEModel
from heapr.model.span import Reads, advance, probe_tokens, reads_of
from heapr.model.tape import Tape, hidden_of

NORM_EPS = 1e-6  # what families' norms add before they divide by the root of a mean square


@dataclass(frozen=True)
class StreamTarget:
    """What brings the residual stream behind a layer to where it was.

    Attributes:
        output_TD: what the layer's experts have to put out, before the layer scales it, biases of W_down
            aside; float32.
        weight_T: 1 over the root mean square of the stream, by which later layers divide it before they read
            it; float32.
    """

    output_TD: Tensor
    weight_T: Tensor

    @classmethod
    def between(cls, stream: Tensor, without: Tensor, scale: float) -> StreamTarget:
        """From the stream as it was, the present one without the layer's experts (both ..., D), and
        `scale_of` the layer."""
        stream_TD, without_TD = (hidden.float().flatten(0, -2) for hidden in (stream, without))
        weight_T = stream_TD.square().mean(1).clamp(min=NORM_EPS).rsqrt()
        return cls((stream_TD - without_TD) / scale, weight_T)

    @classmethod
    def joined(cls, targets: Sequence[StreamTarget]) -> StreamTarget:
        """Those of all batches as one."""
        output_TD = torch.cat([target.output_TD for target in targets])
        weight_T = torch.cat([target.weight_T for target in targets])
        return cls(output_TD, weight_T)


@torch.no_grad()
def check_stream(model: MoEModel) -> None:
    """Refuse models of which `walk_layers` could not say what the residual stream lacks.

    Raises:
        ConfigError: naming the layer and why.
    """
    probe, reads = Tape(probe_tokens(model)), reads_of(model)
    for layer in model.layers:
        scale_of(model, probe, layer, reads)


def scale_of(model: MoEModel, probe: Tape, layer: MoELayer, reads: Reads) -> float:
    """By what a layer multiplies its experts' output when it adds it to the residual stream: 1 in most
    families.

    Args:
        probe: some tokens before the layer in the model as it was; they go behind it.

    Raises:
        ConfigError: the output goes into the stream in another way.
    """
    advance(model, probe, layer.index, reads)
    inputs, without = without_experts(model, probe, layer)
    before: list[Tensor] = []
    with ExitStack() as stack:
        decoder = model.decoder_layers[layer.index]
        hook = decoder.register_forward_pre_hook(partial(_record, before), with_kwargs=True)
        stack.callback(hook.remove)
        behind = hidden_of(advance(model, probe, layer.index + 1, reads)[-1])
    scale = None
    if layout_of(layer.experts).weighs_input:
        why = "weighs its experts' inputs in place of their outputs"
    elif behind.flatten(0, -2).shape != inputs.hidden_TD.shape:
        why = "has several residual streams"
    else:
        why = "does not just add its experts' output to the residual stream"
        streams = [stream.flatten(0, -2).float() for stream in (before[0], without, behind)]
        scale = _scale_of_sum(layer.experts, inputs, *streams)
    if scale is None:
        raise ConfigError(
            f"pruning.repair.target=residual_stream: layer {layer.index} of {type(model.model).__name__}"
            f" {why}, so it cannot bring the stream back; give pruning.repair.target=layer_output"
        )
    return scale


def _scale_of_sum(
    experts: Experts, inputs: ExpertInputs, before_TD: Tensor, without_TD: Tensor, behind_TD: Tensor
) -> float | None:
    """The number that makes the stream behind a layer the one without its experts and so many times their
    output, up to rounding where the streams are largest; None if there is none."""
    routed = (inputs.hidden_TD, inputs.expert_TK, inputs.router_weight_TK)
    output_TD = (
        run_experts(experts, *routed).float() - run_experts(without_atomic_experts(experts), *routed).float()
    )
    added_TD, largest_TD = (
        behind_TD - without_TD,
        torch.stack([before_TD, without_TD, behind_TD]).abs().amax(0),
    )
    rounding_TD = 4 * torch.finfo(inputs.hidden_TD.dtype).eps * largest_TD + 1e-2 * added_TD.abs().mean()
    weighted_TD = output_TD / rounding_TD.clamp(min=1e-12).square()
    together, alone = (float((weighted_TD * other_TD).sum()) for other_TD in (added_TD, output_TD))
    scale = 1.0 if abs(together - alone) <= 0.01 * alone else together / alone  # 1 where all of it is zero
    error_TD = (added_TD - scale * output_TD).abs()
    # NaN passes, calibration will name it.
    return None if (error_TD > rounding_TD + 1e-2 * added_TD.abs().max()).any() else scale


def _record(before: list[Tensor], _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    before.append(args[0] if args else kwargs["hidden_states"])
