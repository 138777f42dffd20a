"""Spans of decoder layers, run inside the model's own forward: the layers before answer from a tape, nothing
behind is run.

In: a model, a batch's token ids and what earlier layers put out. Out: what the layers of a span put out. So
masks, positions and whatever a family does between layers stay the family's own. Layer number L of a model
with L decoder layers is what follows the last one: the end of the body, which makes the final hidden states.
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
    """What a pass was made for is there; nothing behind it is run."""


def run_span(model: MoEModel, ids_NW: Tensor, span: Span, answers: Sequence[Output]) -> list[Output]:
    """Run the layers of a span, at least one, and nothing behind them.

    Args:
        ids_NW: token ids, on the model's device.
        answers: what the layers before the span put out.

    Returns:
        what each layer of the span put out; fewer if a hook or the experts raised `Reached` before.
    """
    outputs: list[Output] = []

    def record(_: nn.Module, __: Any, output: Output) -> None:
        outputs.append(output)
        if len(outputs) == len(span):
            raise Reached

    with ExitStack() as stack:
        stack.enter_context(_answering(model, answers))
        for layer in model.decoder_layers[span.start : span.stop]:
            stack.callback(layer.register_forward_hook(record).remove)
        stack.enter_context(suppress(Reached))
        model.hidden_states(input_ids=ids_NW)
        raise AssertionError(f"of decoder layers {span} only {len(outputs)} were run")
    return outputs


def run_rest(model: MoEModel, ids_NW: Tensor, answers: Sequence[Output]) -> Tensor:
    """Run the layers behind those that answer, and the end of the body: the final hidden states (N, W, D), on
    the model's first device."""
    with _answering(model, answers):
        return model.hidden_states(input_ids=ids_NW)


def _answering(model: MoEModel, answers: Sequence[Output]) -> AbstractContextManager[None]:
    """The first layers answer without being run."""
    layers = model.decoder_layers[: len(answers)]
    answer_of = dict(zip(layers, answers, strict=True))

    def answering(layer: nn.Module) -> Callable[..., Output]:
        return lambda *_, **__: answer_of[layer]

    return forwards(layers, answering)


@dataclass(frozen=True)
class Reads:
    """Whose outputs are read again.

    Attributes:
        of_layer: for each decoder layer, and for the end of the body, the earlier layers whose outputs are
            needed to run it.
    """

    of_layer: tuple[frozenset[int], ...]

    def by(self, *spans: Span) -> set[int]:
        """The layers whose outputs are needed to run the spans by themselves."""
        num_layers = len(self.of_layer) - 1
        read: set[int] = set()
        for span in spans:
            stop = num_layers + 1 if span.stop == num_layers else span.stop
            for layer in range(span.start, stop):
                read |= {earlier for earlier in self.of_layer[layer] if earlier < span.start}
        return read


@torch.no_grad()
def reads_of(model: MoEModel) -> Reads:
    """Which layers read what which earlier layers put out, seen on a few tokens: in most families, each that
    of the layer before."""
    num_layers, tape, of_layer = len(model.decoder_layers), Tape(probe_tokens(model)), []
    for layer in range(num_layers + 1):
        answers = tape.answers(layer)
        with use_heapr_experts(model.model), _Watch(answers) as watch:
            if layer < num_layers:
                tape.put(run_span(model, tape.ids_NW, range(layer, layer + 1), answers))
            else:
                run_rest(model, tape.ids_NW, answers)
        of_layer.append(frozenset(watch.read | set(range(layer)[-1:])))
    return Reads(tuple(of_layer))


def advance(model: MoEModel, tape: Tape, upto: int, reads: Reads) -> list[Output]:
    """Run layers up to and without `upto` onto the tape, which then keeps what layers from there on read;
    what those that ran put out."""
    span = range(len(tape), upto)
    if not span:
        return []
    with use_heapr_experts(model.model):
        outputs = run_span(model, tape.ids_NW, span, tape.answers(span.start))
    tape.put(outputs)
    tape.keep(reads.by(range(upto, len(model.decoder_layers))))
    return outputs


def probe_tokens(model: MoEModel, first: int = 0) -> Tensor:
    """A sequence of 8 tokens, for asking a model how it works: (1, 8)."""
    return torch.arange(first, first + 8, device=model.device).unsqueeze(0)


class _Watch(TorchFunctionMode):  # type: ignore[misc]
    """Sees whose answers any function of torch is given, the reading of a shape included."""

    def __init__(self, answers: Sequence[Output]) -> None:
        super().__init__()
        self.read: set[int] = set()
        self._answers = answers  # alive, so that no other tensor gets one of these ids
        self._layer_of: dict[int, int] = {}
        for layer, answer in enumerate(answers):
            self._layer_of |= {id(part): layer for part in parts_of(answer) if isinstance(part, Tensor)}

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._look(args)
        self._look((kwargs or {}).values())
        return function(*args, **(kwargs or {}))

    def _look(self, values: Any) -> None:
        for value in values:
            if id(value) in self._layer_of:
                self.read.add(self._layer_of[id(value)])
            elif isinstance(value, list | tuple):
                self._look(value)
