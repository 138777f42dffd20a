"""The tape: the outputs of decoder layers for one batch, from which layers answer instead of running again.

In: outputs of decoder layers, in order: hidden states, alone or first in a tuple with whatever else a family
returns. Out: those outputs as answers, and the gradients sent back to them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

Output = Any  # of a decoder layer: hidden states, or a tuple that starts with them


class Tape:
    """One batch and the outputs of decoder layers 0, 1, ... for it.

    Args:
        ids_NW: token ids, on the model's device.
    """

    def __init__(self, ids_NW: Tensor) -> None:
        self.ids_NW = ids_NW
        self._outputs: list[Output] = []
        self._grads: dict[tuple[int, int], Tensor] = {}  # by layer and by place in its output

    def __len__(self) -> int:
        """Number of decoder layers whose outputs are on the tape."""
        return len(self._outputs)

    def put(self, outputs: Sequence[Output]) -> None:
        """Append the outputs of the next layers, detached."""
        for output in outputs:
            self._outputs.append(_each(_detached, output))

    def answers(self, num_layers: int) -> list[Output]:
        """The outputs of the first `num_layers` layers: new tensors that share memory with the tape.
        Floating-point ones require a gradient if autograd records."""
        return [_each(_leaf, output) for output in self._outputs[:num_layers]]

    def keep(self, layers: Collection[int]) -> None:
        """Keep the outputs of these layers and forget all others; gradients stay."""
        for layer, output in enumerate(self._outputs):
            if layer not in layers:
                self._outputs[layer] = _each(_forgotten, output)

    def add_gradients(self, answers: Sequence[Output]) -> None:
        """Add the gradients of these answers to those collected so far."""
        for layer, answer in enumerate(answers):
            for place, part in enumerate(parts_of(answer)):
                grad = part.grad if isinstance(part, Tensor) else None
                if grad is None:
                    continue
                before = self._grads.get((layer, place))
                self._grads[layer, place] = grad if before is None else before + grad

    def gradient(self, layer: int) -> Tensor | None:
        """The gradient collected for a layer's hidden states; None if there is none."""
        return self._grads.get((layer, 0))

    def backward(self, first_layer: int, outputs: Sequence[Output]) -> None:
        """Send the collected gradients back through layers that were run again, and forget these gradients.

        Args:
            first_layer: the first of the layers.
            outputs: one per layer, part of the graph.
        """
        tensors, grads = [], []
        for layer, output in enumerate(outputs, start=first_layer):
            for place, part in enumerate(parts_of(output)):
                grad = self._grads.pop((layer, place), None)
                if grad is not None and part.requires_grad:
                    tensors.append(part)
                    grads.append(grad)
        torch.autograd.backward(tensors, grads)


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


def _detached(part: Any) -> Any:
    return part.detach() if isinstance(part, Tensor) else part


def _leaf(part: Any) -> Any:
    if not isinstance(part, Tensor):
        return part
    needs_grad = part.is_floating_point() and torch.is_grad_enabled()
    return part.detach().requires_grad_(needs_grad)


def _forgotten(_: Any) -> _Forgotten:
    return _Forgotten()
