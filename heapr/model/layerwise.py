"""Repair's walk through a model: MoE layers one after the other, with the inputs of each layer's experts.

In: a model and its batches of token ids. Out: for each MoE layer its `ExpertInputs` and, on request, a
`StreamTarget`. For each batch only what later layers read is kept, which in most families is the hidden
states before one decoder layer.
Shape letters: T tokens of all batches, D model width, K experts per token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from heapr.model.expert_inputs import ExpertInputs, expert_inputs, without_experts
from heapr.model.moe import MoELayer, MoEModel
from heapr.model.span import advance, probe_tokens, reads_of
from heapr.model.stream import StreamTarget, scale_of
from heapr.model.tape import Tape, hidden_of


@torch.no_grad()
def walk_layers(
    model: MoEModel, batches: Sequence[Tensor], *, follow_stream: bool = False
) -> Iterator[tuple[MoELayer, ExpertInputs, StreamTarget | None]]:
    """Yield every MoE layer in order, with the inputs of its experts.

    A layer runs with the experts that it has when the next one is asked for, so later layers see a caller's
    changes.

    Args:
        model: must pass `check_walk`.
        batches: int64 (N, W) token ids each.
        follow_stream: also yield what the layer's experts must put out to restore the residual stream behind
            it: the stream of the model as the walk found it, minus the current one without the layer's
            experts (docs/method.md, 21). Every layer then runs three times, and each batch has a second tape.

    Raises:
        ConfigError: `follow_stream` is set and the model does not pass `check_stream`.
        FloatingPointError: an input is NaN or infinite; the message names the layer.
    """
    reads = reads_of(model)
    on_device = [ids_NW.to(model.device) for ids_NW in batches]
    tapes = [Tape(ids_NW) for ids_NW in on_device]
    originals = [Tape(ids_NW) for ids_NW in on_device]
    probe = Tape(probe_tokens(model))
    for layer in model.layers:
        for tape in tapes:
            advance(model, tape, layer.index, reads)
        target = None
        if follow_stream:
            scale = scale_of(model, probe, layer, reads)
            parts, targets = [], []
            for tape, original in zip(tapes, originals, strict=True):
                part, without = without_experts(model, tape, layer)
                stream = hidden_of(advance(model, original, layer.index + 1, reads)[-1])
                parts.append(part)
                targets.append(StreamTarget.between(stream, without, scale))
            target = StreamTarget.joined(targets)
            del targets, stream, without
        else:
            parts = [expert_inputs(model, tape, layer) for tape in tapes]
        inputs = _joined(layer, parts)
        del parts  # a generator would hold it while the caller works
        yield layer, inputs, target
        del inputs, target


def _joined(layer: MoELayer, inputs: Sequence[ExpertInputs]) -> ExpertInputs:
    """The inputs of all batches in one `ExpertInputs`.

    Raises:
        FloatingPointError: an input is NaN or infinite.
    """
    hidden_TD = torch.cat([part.hidden_TD for part in inputs])
    if not hidden_TD.isfinite().all():
        raise FloatingPointError(
            f"repair: an input of layer {layer.index}'s experts is NaN or infinite; use a wider model.dtype,"
            " or look at weights and text"
        )
    expert_TK = torch.cat([part.expert_TK for part in inputs])
    router_weight_TK = torch.cat([part.router_weight_TK for part in inputs])
    return ExpertInputs(hidden_TD, expert_TK, router_weight_TK)
