"""Forward and backward passes of batches through spans of decoder layers.

In: a model, its batches and the spans. Out: gradients of the summed next-token loss, for whoever observes the
layers; or final hidden states. The backward pass takes one span of one batch at a time, so memory holds the
graph of that, and the layer outputs that other spans read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import chain, count
from typing import Any

import torch
from torch import Tensor

from heapr.model.loss import summed_loss_backward
from heapr.model.moe import MoEModel
from heapr.model.shelf import Files, Memory, Shelf, Spilled
from heapr.model.span import NO_READS, Reads, Span, reads_of, run_rest, run_span
from heapr.model.tape import Tape, hidden_of
from heapr.progress import counted
from heapr.ranks import ONE_PROCESS, Ranks
from heapr.types import Batch, Tokens

Count = Callable[[str], None]  # see `heapr.progress.counted`
Passed = tuple[int, Span, Batch, Tensor]  # see `backward_by_spans`


def _do_nothing(span: Span) -> None:
    """Nothing has to be done after a span."""


@dataclass(frozen=True)
class Way:
    """How batches go through the layers of a model.

    Attributes:
        spans: consecutive spans of decoder layers, from the first layer to the last.
        shelf: keeps the outputs of layers, and gradients.
        together: all batches go through a span before any enters the next one, so each span is needed twice,
            however many batches there are. Otherwise each batch goes all the way before the next one starts.
        on_span: called after the backward passes of all batches through a span, before that is recorded on a
            shelf of files.
        ranks: the processes that share the batches, for messages that number a batch.
    """

    spans: Sequence[Span]
    shelf: Shelf = field(default_factory=Memory)
    together: bool = True
    on_span: Callable[[Span], None] = _do_nothing
    ranks: Ranks = ONE_PROCESS


def backward_by_spans(model: MoEModel, batches: Iterable[Tokens], way: Way) -> Iterator[Passed]:
    """Send every batch's summed next-token loss back to the model's embedded tokens.

    With several spans, batches go forward through one span after the other, and then backward in reverse
    order. Each span but the last thus runs twice. On a shelf of files, work that an earlier process recorded
    is not done again.

    Args:
        model: must pass `check_walk` if there are several spans.
        batches: token ids, int64 (N, W) each, or `Batch`es.
        way: the spans, and in which order batches go through them.

    Yields:
        after each backward pass of a batch through a span: the batch's number, the span, the batch on the
        model's device, and its summed loss in nats, a detached float32 scalar. If an earlier
        process finished all spans, each batch comes once, with an empty span.

    Raises:
        FloatingPointError: a layer's output is NaN or infinite; not checked in the last span.
    """
    num_layers = len(model.decoder_layers)
    assert [layer for span in way.spans for layer in span] == list(range(num_layers)), way.spans
    tapes = (Tape(tokens.to(model.device), way.shelf, number) for number, tokens in enumerate(batches))
    is_recorded = isinstance(way.shelf, Files)
    if way.together and (len(way.spans) > 1 or is_recorded):
        yield from _Journey(model, list(tapes), way).passes()
        return
    for number, tape in enumerate(tapes):
        for _, span, batch, loss in _Journey(model, [tape], way).passes():
            yield number, span, batch, loss


class _Journey:
    """Batches that go through the spans together."""

    def __init__(self, model: MoEModel, tapes: Sequence[Tape], way: Way) -> None:
        self._model, self._tapes, self._way = model, tapes, way
        self._reads = reads_of(model) if len(way.spans) > 1 else NO_READS
        self._losses: dict[int, Tensor] = {}
        self._num_forward, self._first_finished = 0, len(way.spans)
        if isinstance(way.shelf, Files) and way.shelf.state:
            self._recover(way.shelf)

    def _recover(self, files: Files) -> None:
        state: dict[str, Any] = files.state
        recorded = [range(start, stop) for start, stop in state["spans"]]
        self._num_forward, self._first_finished = state["num_forward"], state["first_finished"]
        if self._first_finished < len(recorded):
            # What is finished ends where one of these begins.
            self._way = replace(self._way, spans=recorded)
        elif recorded != list(self._way.spans):
            self._go_on_from(recorded[self._num_forward].start)
        for tape, description in zip(self._tapes, state["tapes"], strict=True):
            tape.recover(description, files)
        for number, loss in state["losses"].items():
            self._losses[int(number)] = torch.tensor(loss, dtype=torch.float32, device=self._model.device)

    def _go_on_from(self, layer: int) -> None:
        """Nothing is finished, and the outputs of all layers before this one are on the tapes."""
        spans = self._way.spans
        is_on_tape = [span.stop <= layer for span in spans]
        self._num_forward = min(sum(is_on_tape), len(spans) - 1)
        self._first_finished = len(spans)

    def passes(self) -> Iterator[Passed]:
        """Go forward, then backward."""
        spans = self._way.spans
        num_passes = len(self._tapes) * (len(spans) - 1 - self._num_forward + self._first_finished)
        with counted(num_passes, "calibrate") if self._model.is_streamed else nullcontext() as count:
            for position in range(self._num_forward, len(spans) - 1):
                self._forward(position, count)
                self._num_forward = position + 1
                self._record()
            if self._first_finished == 0:
                yield from self._nothing_left()
            for position in reversed(range(self._first_finished)):
                yield from self._backward(position, count)
                self._way.on_span(spans[position])
                self._first_finished = position
                self._record()

    @torch.no_grad()
    def _forward(self, position: int, count: Count | None) -> None:
        """Take every batch forward through one span."""
        span = self._way.spans[position]
        with self._model.hold(span):
            for number, tape in enumerate(self._tapes):
                self._forward_one(tape, span, number)
                tape.keep(self._reads.by(*self._way.spans))
                self._count(count)

    def _forward_one(self, tape: Tape, span: Span, number: int) -> None:
        """Run a span and put its outputs on the tape of batch `number`."""
        answers = tape.answers(span.start, self._reads.by(span))
        outputs = run_span(self._model, tape.ids_NW, span, answers)
        for layer, output in enumerate(outputs, start=span.start):
            if not hidden_of(output).isfinite().all():
                batch = self._way.ranks.number(number)
                raise FloatingPointError(
                    f"calibration: the output of decoder layer {layer} is NaN or infinite in batch {batch};"
                    " use a wider model.dtype, or look at weights and text"
                )
        tape.put(outputs)

    def _backward(self, position: int, count: Count | None) -> Iterator[Passed]:
        """Take every batch backward through one span."""
        span = self._way.spans[position]
        with self._model.hold(span):
            for number, tape in enumerate(self._tapes):
                loss = span_backward(self._model, tape, span, self._reads)
                tape.keep(self._reads.by(*self._way.spans[:position]))
                if loss is not None:
                    self._losses[number] = loss
                self._count(count)
                yield number, span, tape.batch, self._losses[number]

    def _count(self, count: Count | None) -> None:
        if count is not None:
            count(self._model.residency.remark())

    def _nothing_left(self) -> Iterator[Passed]:
        for number, tape in enumerate(self._tapes):
            yield number, range(0), tape.batch, self._losses[number]

    def _record(self) -> None:
        """Note in files how far the batches are, so that another process can go on from there."""
        if not isinstance(self._way.shelf, Files):
            return
        losses = {str(number): loss.item() for number, loss in self._losses.items()}
        tapes = [tape.describe() for tape in self._tapes]
        spans = [(span.start, span.stop) for span in self._way.spans]
        self._way.shelf.commit(
            num_forward=self._num_forward,
            first_finished=self._first_finished,
            spans=spans,
            losses=losses,
            tapes=tapes,
        )


def span_backward(model: MoEModel, tape: Tape, span: Span, reads: Reads) -> Tensor | None:
    """Run a span with autograd and go backward through it.

    The backward pass starts from the summed next-token loss if the span reaches the last layer, else from the
    gradients on the tape. The gradients of earlier layers' outputs are added to the tape.

    Returns:
        the summed loss in nats, a detached float32 scalar; None if the span does not reach the last layer.
    """
    answers = tape.answers(span.start, reads.by(span))
    loss = None
    if span.stop < len(model.decoder_layers):
        outputs = run_span(model, tape.ids_NW, span, answers)
        tape.backward(span.start, outputs)
    else:
        hidden = run_rest(model, tape.ids_NW, answers)
        loss = summed_loss_backward(model, hidden, tape.batch.labels_NW)
    tape.add_gradients(span.start, answers)
    return loss


Variant = Callable[[Span], AbstractContextManager[None]]  # a context for running the layers of a span


def unchanged(span: Span) -> AbstractContextManager[None]:
    """The variant that is the model itself."""
    return nullcontext()


@torch.no_grad()
def final_hidden_states(
    model: MoEModel, batches: Iterable[Tensor], variants: Sequence[Variant] = (unchanged,)
) -> Iterator[tuple[Tensor, Tensor]]:
    """Run batches through a model, or through variants of it.

    If the model's layers are not all in memory, all batches of all variants go through one layer before any
    enters the next, so every weight is read once.

    Args:
        model: dense or pruned.
        batches: int64 (N, W) token ids each; a sequence if there are several variants.
        variants: each changes the layers of a span inside its context.

    Yields:
        token ids on the model's device, and final hidden states (N, W, D): for each batch of the first
        variant, then of the next.

    Raises:
        ConfigError: the disk has no room for what layers put out.
    """
    if len(model.spans) > 1:
        yield from _layer_by_layer(model, list(batches), variants)
        return
    (whole,) = model.spans
    for variant in variants:
        for ids_NW in batches:
            on_device = ids_NW.to(model.device)
            with variant(whole):
                hidden = model.hidden_states(input_ids=on_device)
            yield on_device, hidden


def _layer_by_layer(
    model: MoEModel, batches: Sequence[Tensor], variants: Sequence[Variant]
) -> Iterator[tuple[Tensor, Tensor]]:
    reads = reads_of(model)
    num_layers = len(model.decoder_layers)
    on_device = [ids_NW.to(model.device) for ids_NW in batches]
    shelf = model.shelf()
    if isinstance(shelf, Spilled):
        hidden_bytes = model.layers[0].model_width * model.model.dtype.itemsize
        num_tokens = sum(ids_NW.numel() for ids_NW in batches)
        shelf.check_room(len(variants) * num_tokens * hidden_bytes)
    numbers = count()
    tapes_of = []
    for _ in variants:
        tapes = [Tape(ids_NW, shelf, next(numbers)) for ids_NW in on_device]
        tapes_of.append(tapes)
    num_passes = len(model.spans) * len(variants) * len(batches)
    with counted(num_passes, "layers") as count_pass:
        for span in model.spans:
            with model.hold(span):
                _advance_variants(model, span, zip(variants, tapes_of, strict=True), reads, count_pass)
    for tape in chain.from_iterable(tapes_of):
        answers = tape.answers(num_layers, reads.by(range(num_layers, num_layers)))
        yield tape.ids_NW, run_rest(model, tape.ids_NW, answers)
        tape.keep(())


def _advance_variants(
    model: MoEModel,
    span: Span,
    tapes_of: Iterable[tuple[Variant, Sequence[Tape]]],
    reads: Reads,
    count_pass: Count,
) -> None:
    """Run a span onto the tapes of each variant, which then keep what later layers read."""
    later = reads.by(range(span.stop, len(model.decoder_layers)))
    for variant, tapes in tapes_of:
        with variant(span):
            for tape in tapes:
                answers = tape.answers(span.start, reads.by(span))
                tape.put(run_span(model, tape.ids_NW, span, answers))
                tape.keep(later)
                count_pass(model.residency.remark())
