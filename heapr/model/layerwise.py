"""Repair's walk through a model: MoE layers one after the other, with the inputs of each layer's experts.

In: a model and its batches of token ids. Out: for each MoE layer its `ExpertInputs` and, on request, a
`StreamTarget`. For each batch only what later layers read is kept, which in most families is the hidden
states before one decoder layer.
Shape letters: T tokens of all batches, D model width, K experts per token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import count

import torch
from torch import Tensor

from heapr.model.expert_inputs import ExpertInputs, expert_inputs, without_experts
from heapr.model.moe import MoELayer, MoEModel
from heapr.model.span import advance, probe_tokens, reads_of
from heapr.model.stream import StreamTarget, scale_of
from heapr.model.tape import Tape, hidden_of
from heapr.ranks import ONE_PROCESS, Ranks


@torch.no_grad()
def walk_layers(
    model: MoEModel,
    batches: Sequence[Tensor],
    *,
    follow_stream: bool = False,
    ranks: Ranks = ONE_PROCESS,
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
        ranks: the processes that walk together, each with its share of the batches.

    Raises:
        ConfigError: `follow_stream` is set and the model does not pass `check_stream`.
        FloatingPointError: an input is NaN or infinite; the message names the layer.
    """
    shared = ranks.share(batches)
    # A rank without a batch walks with the first one, of which it takes no tokens.
    is_idle = not shared
    walk = _Walk(model, shared or batches[:1], follow_stream=follow_stream)
    with ExitStack() as held:
        for layer in model.layers:
            walk.advance(layer.index, held)
            held.enter_context(model.hold([layer.index]))
            inputs, target = walk.inputs_and_target(layer)
            if is_idle:
                inputs = inputs.first(0)
                target = None if target is None else target.first(0)
            yield layer, inputs, target
            del inputs, target


class _Walk:
    """All batches on their way from one MoE layer to the next.

    Each batch has a tape through the model as it is now. If the stream is followed, another one goes through
    the model as it was, and some tokens probe how a layer adds its experts' outputs to the stream.
    """

    def __init__(self, model: MoEModel, batches: Sequence[Tensor], *, follow_stream: bool) -> None:
        self._model, self._reads = model, reads_of(model)
        shelf, numbers = model.shelf(), count()
        on_device = [ids_NW.to(model.device) for ids_NW in batches]
        self._tapes = [Tape(ids_NW, shelf, next(numbers)) for ids_NW in on_device]
        self._originals: list[Tape] = []
        if follow_stream:
            self._originals = [Tape(ids_NW, shelf, next(numbers)) for ids_NW in on_device]
        self._probe = Tape(probe_tokens(model))

    def advance(self, upto: int, held: ExitStack) -> None:
        """Take every batch up to a layer, one layer after the other.

        Args:
            upto: the layer.
            held: holds the layer at which the batches are; left once they are behind it.
        """
        tapes = [*self._tapes, *self._originals]
        if self._originals:
            tapes.append(self._probe)
        first = min(len(tape) for tape in tapes)
        for layer in range(first, upto):
            with self._model.hold([layer]):
                held.close()
                for tape in tapes:
                    advance(self._model, tape, layer + 1, self._reads)

    def inputs_and_target(self, layer: MoELayer) -> tuple[ExpertInputs, StreamTarget | None]:
        """The inputs of a layer's experts, and the target if the stream is followed."""
        if not self._originals:
            parts = [expert_inputs(self._model, tape, layer) for tape in self._tapes]
            return _joined(layer, parts), None
        scale = scale_of(self._model, self._probe, layer, self._reads)
        parts, targets = [], []
        for tape, original in zip(self._tapes, self._originals, strict=True):
            part, without = without_experts(self._model, tape, layer)
            stream = hidden_of(advance(self._model, original, layer.index + 1, self._reads)[-1])
            parts.append(part)
            targets.append(StreamTarget.between(stream, without, scale))
        target = StreamTarget.joined(targets)
        del targets
        return _joined(layer, parts), target


def _joined(layer: MoELayer, inputs: Sequence[ExpertInputs]) -> ExpertInputs:
    """The inputs of all batches in one `ExpertInputs`.

    Raises:
        FloatingPointError: an input is NaN or infinite.
    """
    hidden = [part.hidden_TD for part in inputs]
    chosen = [part.expert_TK for part in inputs]
    router_weights = [part.router_weight_TK for part in inputs]
    hidden_TD = torch.cat(hidden)
    if not hidden_TD.isfinite().all():
        raise FloatingPointError(
            f"repair: an input of layer {layer.index}'s experts is NaN or infinite; use a wider model.dtype,"
            " or look at weights and text"
        )
    return ExpertInputs(hidden_TD, torch.cat(chosen), torch.cat(router_weights))
