"""The tape: what decoder layers put out for one batch, so that they can answer again without being run.

In: outputs of decoder layers, in order: hidden states, alone or first in a tuple with whatever else a family
returns. Out: answers, and the gradients that came back to them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

Output = Any  # of a decoder layer: hidden states, or a tuple of which they are the first


class Tape:
    """One batch and what decoder layers 0, 1, ... put out for it.

    Args:
        ids_NW: token ids, on the model's device.
    """

    def __init__(self, ids_NW: Tensor) -> None:
        self.ids_NW = ids_NW
        self._outputs: list[Output] = []
        self._grads: dict[tuple[int, int], Tensor] = {}  # by layer and by place in its output

    def __len__(self) -> int:
        """Decoder layers that have put out something."""
        return len(self._outputs)

    def put(self, outputs: Sequence[Output]) -> None:
        """What the next layers put out."""
        self._outputs += [_each(_detached, output) for output in outputs]

    def answers(self, num_layers: int) -> list[Output]:
        """What the first layers put out: tensors of their own that share memory with the tape; where autograd
        records, floating-point ones need a gradient."""
        return [_each(_leaf, output) for output in self._outputs[:num_layers]]

    def keep(self, layers: Collection[int]) -> None:
        """Forget what all other layers put out, and no gradient."""
        for layer, output in enumerate(self._outputs):
            if layer not in layers:
                self._outputs[layer] = _each(_forgotten, output)

    def add_gradients(self, answers: Sequence[Output]) -> None:
        """Add the gradients that came to some answers to those that came before."""
        for layer, answer in enumerate(answers):
            for place, part in enumerate(parts_of(answer)):
                if isinstance(part, Tensor) and part.grad is not None:
                    before = self._grads.get((layer, place))
                    self._grads[layer, place] = part.grad if before is None else before + part.grad

    def gradient(self, layer: int) -> Tensor | None:
        """What has come back to the hidden states behind a layer."""
        return self._grads.get((layer, 0))

    def backward(self, first_layer: int, outputs: Sequence[Output]) -> None:
        """Send the gradients of what some layers put out, run once more from `first_layer` on, back through
        them, and forget them."""
        tensors, grads = [], []
        for layer, output in enumerate(outputs, start=first_layer):
            for place, part in enumerate(parts_of(output)):
                grad = self._grads.pop((layer, place), None)
                if grad is not None and part.requires_grad:
                    tensors.append(part)
                    grads.append(grad)
        torch.autograd.backward(tensors, grads)


def parts_of(output: Output) -> tuple[Any, ...]:
    return tuple(output) if isinstance(output, tuple) else (output,)


def hidden_of(output: Output) -> Tensor:
    """The hidden states."""
    hidden: Tensor = parts_of(output)[0]
    return hidden


class _Forgotten:
    """Stands for what nobody reads again: whoever does so all the same must not take it for None."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"{name} of a decoder layer's output that the tape has forgotten")


def _each(function: Callable[[Any], Any], output: Output) -> Output:
    return tuple(map(function, output)) if isinstance(output, tuple) else function(output)


def _detached(part: Any) -> Any:
    return part.detach() if isinstance(part, Tensor) else part


def _leaf(part: Any) -> Any:
    if not isinstance(part, Tensor):
        return part
    return part.detach().requires_grad_(part.is_floating_point() and torch.is_grad_enabled())


def _forgotten(_: Any) -> _Forgotten:
    return _Forgotten()
