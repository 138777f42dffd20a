"""Spans of decoder layers, run inside the model's own forward.

Earlier layers answer from a tape, later ones do not run.

In: a model, a batch's token ids and the outputs of earlier layers. Out: the outputs of the span's layers. The
family's own code thus still makes masks, positions and whatever else it does between layers. In a model with
L decoder layers, layer number L stands for the end of the body, which makes the final hidden states.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from heapr.model.experts.dispatch import forwards, use_heapr_experts
from heapr.model.moe import MoEModel
from heapr.model.tape import Output, Tape, parts_of

Span = range  # decoder layers [start, stop)


class Reached(Exception):  # noqa: N818 - not an error
    """Ends a pass as soon as it has what it was made for."""


def run_span(model: MoEModel, ids_NW: Tensor, span: Span, answers: Sequence[Output]) -> list[Output]:
    """Run the layers of a span (at least one), and no later layer.

    Args:
        ids_NW: token ids, on the model's device.
        answers: the outputs of the layers before the span.

    Returns:
        the output of each layer of the span; fewer if a hook or the experts raised `Reached` earlier.
    """
    outputs: list[Output] = []

    def record(_: nn.Module, __: Any, output: Output) -> None:
        outputs.append(output)
        if len(outputs) == len(span):
            raise Reached

    with ExitStack() as stack:
        stack.enter_context(model.hold(span))
        stack.enter_context(_answering(model, answers))
        for layer in model.decoder_layers[span.start : span.stop]:
            stack.callback(layer.register_forward_hook(record).remove)
        stack.enter_context(suppress(Reached))
        model.hidden_states(input_ids=ids_NW)
        raise AssertionError(f"only {len(outputs)} of decoder layers {span} were run")
    return outputs


def run_rest(model: MoEModel, ids_NW: Tensor, answers: Sequence[Output]) -> Tensor:
    """Run the layers that follow those that answer, and the end of the body.

    Returns:
        the final hidden states (N, W, D), on the model's first device.
    """
    rest = range(len(answers), len(model.decoder_layers))
    with model.hold(rest), _answering(model, answers):
        return model.hidden_states(input_ids=ids_NW)


def _answering(model: MoEModel, answers: Sequence[Output]) -> AbstractContextManager[None]:
    """Inside the context, the first layers return their answers instead of running."""
    layers = model.decoder_layers[: len(answers)]
    answer_of = dict(zip(layers, answers, strict=True))

    def answering(layer: nn.Module) -> Callable[..., Output]:
        return lambda *_, **__: answer_of[layer]

    return forwards(layers, answering)


@dataclass(frozen=True)
class Reads:
    """Which layers read the outputs of which earlier layers.

    Attributes:
        of_layer: for each decoder layer, and for the end of the body, the earlier layers whose outputs it
            needs.
    """

    of_layer: tuple[frozenset[int], ...]

    def by(self, *spans: Span) -> set[int]:
        """The layers whose outputs are needed to run each of the spans alone."""
        if not self.of_layer:
            return set()
        num_layers = len(self.of_layer) - 1
        read: set[int] = set()
        for span in spans:
            stop = num_layers + 1 if span.stop == num_layers else span.stop
            for layer in range(span.start, stop):
                read |= {earlier for earlier in self.of_layer[layer] if earlier < span.start}
        return read


NO_READS = Reads(())  # of a single span: there is nothing to read again


def reads_of(model: MoEModel) -> Reads:
    """Find out, on a few tokens, which earlier outputs each layer reads. It is done once per model.

    In most families a layer reads only those of the layer before it.
    """
    if model.reads is None:
        model.reads = [sorted(layers) for layers in _look(model).of_layer]
    return Reads(tuple(map(frozenset, model.reads)))


@torch.no_grad()
def _look(model: MoEModel) -> Reads:
    """Run one layer after the other and see what each reads."""
    num_layers = len(model.decoder_layers)
    tape = Tape(probe_tokens(model))
    of_layer = []
    for layer in range(num_layers + 1):
        answers = tape.answers(layer)
        with use_heapr_experts(model.model), _Watch(answers) as watch:
            if layer < num_layers:
                tape.put(run_span(model, tape.ids_NW, range(layer, layer + 1), answers))
            else:
                run_rest(model, tape.ids_NW, answers)
        layer_before = set(range(layer)[-1:])
        of_layer.append(frozenset(watch.read | layer_before))
    return Reads(tuple(of_layer))


def advance(model: MoEModel, tape: Tape, upto: int, reads: Reads) -> list[Output]:
    """Run the layers before `upto` that are not on the tape yet, and put their outputs on it.

    The tape then keeps only what layers from `upto` on read.

    Returns:
        the outputs of the layers that ran.
    """
    span = range(len(tape), upto)
    if not span:
        return []
    with use_heapr_experts(model.model):
        outputs = run_span(model, tape.ids_NW, span, tape.answers(span.start, reads.by(span)))
    tape.put(outputs)
    tape.keep(reads.by(range(upto, len(model.decoder_layers))))
    return outputs


def probe_tokens(model: MoEModel, first: int = 0) -> Tensor:
    """A sequence of 8 token ids (1, 8), `first` and those that follow it, for probing how a model works."""
    return torch.arange(first, first + 8, device=model.device).unsqueeze(0)


class _Watch(TorchFunctionMode):  # type: ignore[misc]
    """Records which layers' answers are passed to any torch function; reading a shape counts."""

    def __init__(self, answers: Sequence[Output]) -> None:
        super().__init__()
        self.read: set[int] = set()
        self._answers = answers  # kept alive, so that no other tensor gets one of these ids
        self._layer_of: dict[int, int] = {}
        for layer, answer in enumerate(answers):
            for part in parts_of(answer):
                if isinstance(part, Tensor):
                    self._layer_of[id(part)] = layer

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._look(args)
        self._look(kwargs.values())
        return function(*args, **kwargs)

    def _look(self, values: Any) -> None:
        for value in values:
            if id(value) in self._layer_of:
                self.read.add(self._layer_of[id(value)])
            elif isinstance(value, list | tuple):
                self._look(value)
