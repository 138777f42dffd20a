"""The tape: the outputs of decoder layers for one batch, from which layers answer instead of running again.

In: outputs of decoder layers, in order: hidden states, alone or first in a tuple with whatever else a family
returns. Out: those outputs as answers, and the gradients sent back to them. Both are kept on a shelf: in
memory or in files.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from heapr.model.shelf import Files, Memory, Shelf
from heapr.types import Batch, Tokens

Output = Any  # of a decoder layer: hidden states, or a tuple that starts with them
TENSOR, FORGOTTEN, NOTHING = "tensor", "forgotten", "nothing"  # parts of an output, in descriptions


class Tape:
    """One batch and the outputs of decoder layers 0, 1, ... for it.

    Args:
        tokens: on the model's device.
        shelf: where outputs and gradients are kept. None keeps them in memory on their own device.
        number: of the batch; unique among the tapes on a shelf.

    Attributes:
        ids_NW: token ids.
        batch: the same, and which of them are predicted.
    """

    def __init__(self, tokens: Tokens, shelf: Shelf | None = None, number: int = 0) -> None:
        self.batch = Batch.of(tokens)
        self.ids_NW = self.batch.ids_NW
        self._shelf = Memory() if shelf is None else shelf
        self._number = number
        self._outputs: list[Output] = []
        # Name on the shelf, and gradient, by layer and by place in its output.
        self._grads: dict[tuple[int, int], tuple[str, Tensor]] = {}

    def __len__(self) -> int:
        """Number of decoder layers whose outputs are on the tape."""
        return len(self._outputs)

    def put(self, outputs: Sequence[Output]) -> None:
        """Append the outputs of the next layers, detached."""
        for output in outputs:
            layer = len(self._outputs)
            parts = [self._kept(layer, place, part) for place, part in enumerate(parts_of(output))]
            self._outputs.append(_like(output, parts))

    def answers(self, num_layers: int, read: Collection[int] | None = None) -> list[Output]:
        """The outputs of the first `num_layers` layers: new tensors on the model's device that share memory
        with the tape where they can. Floating-point ones require a gradient if autograd records.

        Args:
            num_layers: number of layers.
            read: layers whose outputs will be read; others are given as forgotten. None means all.
        """
        answers = []
        for layer, output in enumerate(self._outputs[:num_layers]):
            is_read = read is None or layer in read
            answer = _each(self._leaf, output) if is_read else _each(_forgotten, output)
            answers.append(answer)
        return answers

    def keep(self, layers: Collection[int]) -> None:
        """Keep the outputs of these layers and forget all others; gradients stay."""
        for layer, output in enumerate(self._outputs):
            if layer in layers:
                continue
            for place, part in enumerate(parts_of(output)):
                if isinstance(part, Tensor):
                    name = self._name_of(layer, place)
                    self._shelf.drop(name)
            self._outputs[layer] = _each(_forgotten, output)

    def add_gradients(self, first_layer: int, answers: Sequence[Output]) -> None:
        """Add the gradients of these answers to those collected so far.

        Args:
            first_layer: the first layer of the span that the gradients come from.
            answers: what that span read.
        """
        for layer, answer in enumerate(answers):
            for place, part in enumerate(parts_of(answer)):
                grad = part.grad if isinstance(part, Tensor) else None
                if grad is None:
                    continue
                where = (layer, place)
                if where in self._grads:
                    old_name, before = self._grads[where]
                    grad = before.to(grad.device) + grad
                    self._shelf.drop(old_name)
                # A new name for each sum, so that the one before outlives a crash in this span.
                name = f"gradient-{self._number}-{layer}-{place}-{first_layer}"
                kept = self._shelf.put(name, grad)
                self._grads[where] = (name, kept)

    def gradient(self, layer: int) -> Tensor | None:
        """The gradient collected for a layer's hidden states; None if there is none."""
        _, grad = self._grads.get((layer, 0), ("", None))
        return grad

    def backward(self, first_layer: int, outputs: Sequence[Output]) -> None:
        """Send the collected gradients back through layers that were run again, and forget these gradients.

        Args:
            first_layer: the first of the layers.
            outputs: one per layer, part of the graph.
        """
        tensors, grads = [], []
        for layer, output in enumerate(outputs, start=first_layer):
            for place, part in enumerate(parts_of(output)):
                name, grad = self._grads.pop((layer, place), ("", None))
                if grad is None:
                    continue
                self._shelf.drop(name)
                if part.requires_grad:
                    tensors.append(part)
                    grads.append(grad.to(part.device))
        torch.autograd.backward(tensors, grads)

    def describe(self) -> dict[str, Any]:
        """The names and places of what is on the shelf, in JSON types, for `recover`."""
        outputs = []
        for output in self._outputs:
            kinds = [_kind_of(part) for part in parts_of(output)]
            outputs.append(kinds if isinstance(output, tuple) else kinds[0])
        grads = []
        for (layer, place), (name, _) in self._grads.items():
            grads.append([layer, place, name])
        return {"outputs": outputs, "gradients": grads}

    def recover(self, description: Mapping[str, Any], files: Files) -> None:
        """Take over what an earlier process left in files and described."""
        for layer, kinds in enumerate(description["outputs"]):
            is_tuple = isinstance(kinds, list)
            parts = []
            for place, kind in enumerate(kinds if is_tuple else [kinds]):
                name = self._name_of(layer, place)
                parts.append(_recovered(kind, name, files))
            self._outputs.append(tuple(parts) if is_tuple else parts[0])
        for layer, place, name in description["gradients"]:
            grad = files.get(name)
            self._grads[layer, place] = (name, grad)

    def _kept(self, layer: int, place: int, part: Any) -> Any:
        """A part as it is kept."""
        if not isinstance(part, Tensor):
            return part
        name = self._name_of(layer, place)
        return self._shelf.put(name, part)

    def _name_of(self, layer: int, place: int) -> str:
        """Name of an output's part on the shelf."""
        return f"output-{self._number}-{layer}-{place}"

    def _leaf(self, part: Any) -> Any:
        """A part as an answer, see `answers`."""
        if not isinstance(part, Tensor):
            return part
        on_device = part.to(self.ids_NW.device)
        needs_grad = part.is_floating_point() and torch.is_grad_enabled()
        return on_device.detach().requires_grad_(needs_grad)


def parts_of(output: Output) -> tuple[Any, ...]:
    """A decoder layer's output as a tuple."""
    return tuple(output) if isinstance(output, tuple) else (output,)


def hidden_of(output: Output) -> Tensor:
    """The hidden states in a decoder layer's output."""
    hidden: Tensor = parts_of(output)[0]
    return hidden


class _Forgotten:
    """Stands for an output that no later layer should read: using it raises, where None might pass."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"{name} of a decoder layer's output that the tape has forgotten")


def _each(function: Callable[[Any], Any], output: Output) -> Output:
    """The output with a function applied to each of its parts."""
    parts = [function(part) for part in parts_of(output)]
    return _like(output, parts)


def _like(output: Output, parts: Sequence[Any]) -> Output:
    """Parts as a tuple, or alone, as an output is."""
    if isinstance(output, tuple):
        return tuple(parts)
    return parts[0]


def _recovered(kind: str, name: str, files: Files) -> Any:
    """A part of an output from its description."""
    if kind == TENSOR:
        return files.get(name)
    return _Forgotten() if kind == FORGOTTEN else None


def _kind_of(part: Any) -> str:
    """A part of an output, for descriptions."""
    if isinstance(part, Tensor):
        return TENSOR
    assert part is None or isinstance(part, _Forgotten), f"{type(part)} in a decoder layer's output"
    return NOTHING if part is None else FORGOTTEN


def _forgotten(_: Any) -> _Forgotten:
    return _Forgotten()
