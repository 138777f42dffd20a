"""The residual stream: what a layer's experts must put out to restore it, and which models allow that.

In: hidden states behind a decoder layer, of the original model and of the current one without the layer's
experts. Out: a `StreamTarget` (docs/method.md, 21).
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
from heapr.model.experts.grouped import run_fastest
from heapr.model.experts.layout import Experts, layout_of
from heapr.model.moe import MoELayer, MoEModel
from heapr.model.span import Reads, advance, probe_tokens, reads_of
from heapr.model.tape import Tape, hidden_of

NORM_EPS = 1e-6  # the epsilon that families' norms add to a mean square


@dataclass(frozen=True)
class StreamTarget:
    """What restores the residual stream behind a layer.

    Attributes:
        output_TD: the output that the layer's experts must give, without biases of W_down and before the
            layer scales it; float32.
        weight_T: 1 / RMS of the stream, the factor that later layers' norms apply to it; float32.
    """

    output_TD: Tensor
    weight_T: Tensor

    @classmethod
    def between(cls, stream: Tensor, without: Tensor, scale: float) -> StreamTarget:
        """output = (stream - without) / scale.

        Args:
            stream: the original stream (..., D).
            without: the current stream without the layer's experts (..., D).
            scale: `scale_of` the layer.
        """
        stream_TD = stream.float().flatten(0, -2)
        without_TD = without.float().flatten(0, -2)
        weight_T = stream_TD.square().mean(1).clamp(min=NORM_EPS).rsqrt()
        return cls((stream_TD - without_TD) / scale, weight_T)

    def first(self, number: int) -> StreamTarget:
        """The target of the first tokens."""
        return StreamTarget(self.output_TD[:number], self.weight_T[:number])

    @classmethod
    def joined(cls, targets: Sequence[StreamTarget]) -> StreamTarget:
        """The targets of all batches in one."""
        outputs = [target.output_TD for target in targets]
        weights = [target.weight_T for target in targets]
        return cls(torch.cat(outputs), torch.cat(weights))


@torch.no_grad()
def check_stream(model: MoEModel) -> None:
    """Refuse models in which `walk_layers` cannot find out what the residual stream lacks.

    Raises:
        ConfigError: the message names the layer and the reason.
    """
    probe, reads = Tape(probe_tokens(model)), reads_of(model)
    for layer in model.layers:
        with model.hold([layer.index]):
            scale_of(model, probe, layer, reads)


def scale_of(model: MoEModel, probe: Tape, layer: MoELayer, reads: Reads) -> float:
    """The factor by which a layer multiplies its experts' output before adding it to the residual stream.

    It is 1 in most families.

    Args:
        probe: a tape of a few tokens that ends before the layer; it is advanced past the layer.

    Raises:
        ConfigError: the layer does not simply add the scaled output to the stream.
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
        why = "weighs its experts' inputs instead of their outputs"
    elif behind.flatten(0, -2).shape != inputs.hidden_TD.shape:
        why = "has several residual streams"
    else:
        why = "does not just add its experts' output to the residual stream"
        streams = [stream.flatten(0, -2).float() for stream in (before[0], without, behind)]
        scale = _scale_of_sum(layer.experts, inputs, *streams)
    if scale is None:
        raise ConfigError(
            f"pruning.repair.target=residual_stream: layer {layer.index} of {type(model.model).__name__}"
            f" {why}, so repair cannot restore the stream; give pruning.repair.target=layer_output"
        )
    return scale


def _scale_of_sum(
    experts: Experts, inputs: ExpertInputs, before_TD: Tensor, without_TD: Tensor, behind_TD: Tensor
) -> float | None:
    """The scale for which behind = without + scale * output, up to rounding of the largest stream.

    It is the least-squares solution, weighted by 1 / rounding^2; None if no scale fits.

    Args:
        before_TD: the stream before the layer.
        without_TD: the stream behind the layer without its experts.
        behind_TD: the stream behind the layer.
    """
    routed = (inputs.hidden_TD, inputs.expert_TK, inputs.router_weight_TK)
    biases_TD = run_fastest(without_atomic_experts(experts), *routed).float()
    output_TD = run_fastest(experts, *routed).float() - biases_TD
    added_TD = behind_TD - without_TD
    largest_TD = torch.stack([before_TD, without_TD, behind_TD]).abs().amax(0)
    eps = torch.finfo(inputs.hidden_TD.dtype).eps
    rounding_TD = 4 * eps * largest_TD + 1e-2 * added_TD.abs().mean()
    weighted_TD = output_TD / rounding_TD.clamp(min=1e-12).square()
    numerator = float((weighted_TD * added_TD).sum())
    denominator = float((weighted_TD * output_TD).sum())
    # Also where both are zero.
    is_one = abs(numerator - denominator) <= 0.01 * denominator
    scale = 1.0 if is_one else numerator / denominator
    error_TD = (added_TD - scale * output_TD).abs()
    # False for NaN, which calibration reports.
    is_off = (error_TD > rounding_TD + 1e-2 * added_TD.abs().max()).any()
    return None if is_off else scale


def _record(before: list[Tensor], _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Append the hidden states that a decoder layer is called with."""
    before.append(args[0] if args else kwargs["hidden_states"])
