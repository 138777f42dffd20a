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

Output = Any  # of a decoder layer: hidden states, or a tuple that starts with them
TENSOR, FORGOTTEN, NOTHING = "tensor", "forgotten", "nothing"  # parts of an output, in descriptions


class Tape:
    """One batch and the outputs of decoder layers 0, 1, ... for it.

    Args:
        ids_NW: token ids, on the model's device.
        shelf: where outputs and gradients are kept. None keeps them in memory on their own device.
        number: of the batch; unique among the tapes on a shelf.
    """

    def __init__(self, ids_NW: Tensor, shelf: Shelf | None = None, number: int = 0) -> None:
        self.ids_NW = ids_NW
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
            self._outputs.append(tuple(parts) if isinstance(output, tuple) else parts[0])

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
            answers.append(_each(self._leaf if is_read else _forgotten, output))
        return answers

    def keep(self, layers: Collection[int]) -> None:
        """Keep the outputs of these layers and forget all others; gradients stay."""
        for layer, output in enumerate(self._outputs):
            if layer in layers:
                continue
            for place, part in enumerate(parts_of(output)):
                if isinstance(part, Tensor):
                    self._shelf.drop(self._name_of(layer, place))
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
                if (layer, place) in self._grads:
                    name, before = self._grads[layer, place]
                    grad = before.to(grad.device) + grad
                    self._shelf.drop(name)
                # A new name for each sum, so that the one before outlives a crash in this span.
                name = f"gradient-{self._number}-{layer}-{place}-{first_layer}"
                self._grads[layer, place] = (name, self._shelf.put(name, grad))

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
        grads = [[layer, place, name] for (layer, place), (name, _) in self._grads.items()]
        return {"outputs": outputs, "gradients": grads}

    def recover(self, description: Mapping[str, Any], files: Files) -> None:
        """Take over what an earlier process left in files and described."""
        for layer, kinds in enumerate(description["outputs"]):
            parts: list[Any] = []
            for place, kind in enumerate(kinds if isinstance(kinds, list) else [kinds]):
                if kind == TENSOR:
                    parts.append(files.get(self._name_of(layer, place)))
                else:
                    parts.append(_Forgotten() if kind == FORGOTTEN else None)
            self._outputs.append(tuple(parts) if isinstance(kinds, list) else parts[0])
        for layer, place, name in description["gradients"]:
            self._grads[layer, place] = (name, files.get(name))

    def _kept(self, layer: int, place: int, part: Any) -> Any:
        return self._shelf.put(self._name_of(layer, place), part) if isinstance(part, Tensor) else part

    def _name_of(self, layer: int, place: int) -> str:
        return f"output-{self._number}-{layer}-{place}"

    def _leaf(self, part: Any) -> Any:
        if not isinstance(part, Tensor):
            return part
        needs_grad = part.is_floating_point() and torch.is_grad_enabled()
        return part.to(self.ids_NW.device).detach().requires_grad_(needs_grad)


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
    return tuple(map(function, output)) if isinstance(output, tuple) else function(output)


def _kind_of(part: Any) -> str:
    if isinstance(part, Tensor):
        return TENSOR
    assert part is None or isinstance(part, _Forgotten), f"{type(part)} in a decoder layer's output"
    return NOTHING if part is None else FORGOTTEN


def _forgotten(_: Any) -> _Forgotten:
    return _Forgotten()
