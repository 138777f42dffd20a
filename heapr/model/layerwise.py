"""MoE layers one after the other: what flows into the experts of each, behind earlier layers that may have changed on the way.

In: a model and its batches of token ids. Out: for each MoE layer its `ExpertInputs` and, if asked for, a `StreamTarget`. Of a batch
only the hidden states before one decoder layer are kept, so that memory is that of one layer.
Shape letters: T tokens of all batches, D model width, K experts per token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from heapr.model.moe import MoELayer, MoEModel
from heapr.model.stream import StreamTarget, few_tokens, scale_of
from heapr.model.walker import ExpertInputs, Walker


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
    walkers, originals = ([Walker(model, ids_NW.to(model.device)) for ids_NW in batches] for _ in range(2))
    few = few_tokens(model)
    for layer in model.layers:
        parts, targets, scale = [], [], scale_of(layer, few) if follow_stream else 1.0
        for walker, original in zip(walkers, originals, strict=True):
            part, without = walker.reach(layer, beyond=follow_stream)
            parts.append(part)
            if without is not None:
                targets.append(StreamTarget.between(original.leave(layer), without, scale))
        inputs = _joined(layer, parts)
        target = (
            StreamTarget(*(torch.cat([getattr(part, name) for part in targets]) for name in ("output_TD", "weight_T"))) if targets else None
        )
        del parts, targets  # a generator holds its variables while the caller is at work
        yield layer, inputs, target
        del inputs, target


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
