"""Batches on their way through spans of decoder layers: forwards, then backwards.

In: a model, its batches and the spans. Out: gradients of the summed next-token loss, for whoever observes the
layers. A span runs in the backward direction as a whole, so memory is that of one span of one batch, and of
what layers put out that other spans read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from heapr.model.moe import MoEModel, summed_loss_backward
from heapr.model.span import Span, reads_of, run_rest, run_span
from heapr.model.tape import Tape, hidden_of


def backward_by_spans(
    model: MoEModel, batches: Iterable[Tensor], spans: Sequence[Span]
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Send every batch's summed next-token loss back to where the model starts from. Several spans: all
    batches go forwards through one before any goes through the next, then backwards in the reverse order, so
    that each span but the last runs twice.

    Args:
        model: for several spans one that passes `check_walk`.
        batches: int64 (N, W) token ids each.
        spans: of decoder layers, one behind the other from the first layer to the last.

    Yields:
        after each backward pass of a batch through a span: the batch's number, its token ids on the model's
        device, and its summed loss in nats, a detached float32 scalar.

    Raises:
        FloatingPointError: what a layer puts out is NaN or infinite; seen before the last span only.
    """
    num_layers = len(model.decoder_layers)
    assert [layer for span in spans for layer in span] == list(range(num_layers)), spans
    tapes = (Tape(ids_NW.to(model.device)) for ids_NW in batches)
    if len(spans) == 1:
        for number, tape in enumerate(tapes):
            loss = span_backward(model, tape, spans[0])
            assert loss is not None
            yield number, tape.ids_NW, loss
        return
    held, reads, losses = list(tapes), reads_of(model), {}
    for span in spans[:-1]:
        for number, tape in enumerate(held):
            _forward(model, tape, span, number)
            tape.keep(reads.by(*spans))
    for position in reversed(range(len(spans))):
        for number, tape in enumerate(held):
            loss = span_backward(model, tape, spans[position])
            tape.keep(reads.by(*spans[:position]))
            if loss is not None:
                losses[number] = loss
            yield number, tape.ids_NW, losses[number]


def span_backward(model: MoEModel, tape: Tape, span: Span) -> Tensor | None:
    """Run a span once more, where autograd records, and send back through it what came back to it: the summed
    next-token loss of a span that reaches the last layer, else the gradients on the tape. Those of the
    answers that it read are added to the tape.

    Returns:
        the summed loss in nats, a detached float32 scalar, of a span that reaches the last layer.
    """
    answers, loss = tape.answers(span.start), None
    if span.stop < len(model.decoder_layers):
        tape.backward(span.start, run_span(model, tape.ids_NW, span, answers))
    else:
        loss = summed_loss_backward(model, run_rest(model, tape.ids_NW, answers), tape.ids_NW)
    tape.add_gradients(answers)
    return loss


@torch.no_grad()
def _forward(model: MoEModel, tape: Tape, span: Span, number: int) -> None:
    """Run a span onto the tape of a batch."""
    outputs = run_span(model, tape.ids_NW, span, tape.answers(span.start))
    for layer, output in enumerate(outputs, start=span.start):
        if not hidden_of(output).isfinite().all():
            raise FloatingPointError(
                f"calibration: what decoder layer {layer} puts out is NaN or infinite in batch {number}; "
                "use a wider model.dtype, or look at weights and text"
            )
    tape.put(outputs)
