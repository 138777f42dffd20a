"""Forward and backward passes of batches through spans of decoder layers.

In: a model, its batches and the spans. Out: gradients of the summed next-token loss, for whoever observes the
layers. The backward pass takes one span of one batch at a time, so memory holds the graph of that, and the
layer outputs that other spans read.
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
    """Send every batch's summed next-token loss back to the model's embedded tokens.

    With several spans, all batches go forward through a span before any enters the next one, and then
    backward in reverse order. Each span but the last thus runs twice.

    Args:
        model: must pass `check_walk` if there are several spans.
        batches: int64 (N, W) token ids each.
        spans: consecutive spans of decoder layers, from the first layer to the last.

    Yields:
        after each backward pass of a batch through a span: the batch's number, its token ids on the model's
        device, and its summed loss in nats, a detached float32 scalar.

    Raises:
        FloatingPointError: a layer's output is NaN or infinite; not checked in the last span.
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
    held = list(tapes)
    reads = reads_of(model)
    losses = {}
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
    """Run a span with autograd and go backward through it.

    The backward pass starts from the summed next-token loss if the span reaches the last layer, else from the
    gradients on the tape. The gradients of earlier layers' outputs are added to the tape.

    Returns:
        the summed loss in nats, a detached float32 scalar; None if the span does not reach the last layer.
    """
    answers = tape.answers(span.start)
    loss = None
    if span.stop < len(model.decoder_layers):
        outputs = run_span(model, tape.ids_NW, span, answers)
        tape.backward(span.start, outputs)
    else:
        hidden = run_rest(model, tape.ids_NW, answers)
        loss = summed_loss_backward(model, hidden, tape.ids_NW)
    tape.add_gradients(answers)
    return loss


@torch.no_grad()
def _forward(model: MoEModel, tape: Tape, span: Span, number: int) -> None:
    """Run a span and put its outputs on the tape of batch `number`."""
    outputs = run_span(model, tape.ids_NW, span, tape.answers(span.start))
    for layer, output in enumerate(outputs, start=span.start):
        if not hidden_of(output).isfinite().all():
            raise FloatingPointError(
                f"calibration: the output of decoder layer {layer} is NaN or infinite in batch {number}; use"
                " a wider model.dtype, or look at weights and text"
            )
    tape.put(outputs)
