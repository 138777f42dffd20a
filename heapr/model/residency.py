"""Which decoder layers of a model are in memory: all of them, or those that are at work.

In: a model, and for one that is larger than memory its `LayerWeights`. Out: `hold`, inside which layers are
there, and `change`, which reaches a layer whenever it is. Whoever runs a layer need not ask: a layer that
nobody holds is read for its forward.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from heapr.model.experts.layout import Experts
from heapr.model.shelf import Memory, Shelf, Spilled
from heapr.model.weights import LayerWeights

Change = Callable[[], None]  # of one layer's experts, in place or by others


class ExpertsPlace(Protocol):
    """Where a decoder layer's experts are."""

    @property
    def index(self) -> int: ...

    @property
    def experts(self) -> Experts: ...

    def replace_experts(self, experts: Any) -> None: ...


class Residency(Protocol):
    """What knows which layers are in memory."""

    def spans(self, num_layers: int) -> list[range]:
        """The layers that work together, from the first to the last."""
        ...

    @contextmanager
    def hold(self, layers: Sequence[int]) -> Iterator[None]:
        """Inside, these layers are in memory."""
        ...

    def shelf(self) -> Shelf:
        """A new place for the outputs of layers."""
        ...

    def remark(self) -> str:
        """How the reading goes, for progress bars."""
        ...

    def change(self, place: ExpertsPlace, change: Change) -> None:
        """Change a layer's experts. If they are not in memory, the change is applied to their shapes now and
        to their weights whenever they are read."""
        ...

    def remember(self, place: ExpertsPlace, change: Change) -> None:
        """The same for a layer in memory that has been changed already."""
        ...


class InMemory:
    """The whole model is in memory, and stays."""

    def spans(self, num_layers: int) -> list[range]:
        return [range(num_layers)]

    @contextmanager
    def hold(self, layers: Sequence[int]) -> Iterator[None]:
        yield

    def shelf(self) -> Shelf:
        return Memory()

    def remark(self) -> str:
        return ""

    def change(self, place: ExpertsPlace, change: Change) -> None:
        change()

    def remember(self, place: ExpertsPlace, change: Change) -> None:
        """It stays in memory."""


class Streamed:
    """A layer is in memory while somebody holds it or while it runs.

    Experts that a change replaced are the same module all the time, in memory or not, so that whoever watches
    it, or chose its forward, need not know.

    Args:
        layers: the decoder layers, on the meta device; their forwards are wrapped.
        places: of the experts in them.
        weights: of the same model.
        tapes: folder in which what layers put out lies meanwhile. With None, it lies in the CPU's memory.

    Attributes:
        seconds_read: spent on waiting for weights.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        places: Sequence[ExpertsPlace],
        weights: LayerWeights,
        tapes: Path | None = None,
    ) -> None:
        self.weights, self.tapes = weights, tapes
        self.seconds_read = 0.0
        self._opened = time.perf_counter()
        self._holders = [0] * len(layers)
        self._last_read = -1
        self._places = {place.index: place for place in places}
        self._dense = {place.index: place.experts for place in places}
        self._shapes = dict(self._dense)  # what stands for a layer's experts while they are not in memory
        self._changes: dict[int, list[Change]] = {place.index: [] for place in places}
        for number, layer in enumerate(layers):
            layer.forward = self._reading(number, layer.forward)

    def spans(self, num_layers: int) -> list[range]:
        return [range(layer, layer + 1) for layer in range(num_layers)]

    @contextmanager
    def hold(self, layers: Sequence[int]) -> Iterator[None]:
        with ExitStack() as stack:
            for layer in layers:
                self._enter(layer)
                stack.callback(self._leave, layer)
            yield

    def shelf(self) -> Shelf:
        return Memory(torch.device("cpu")) if self.tapes is None else Spilled(self.tapes)

    def remark(self) -> str:
        rate = self.weights.shards.bytes_read / max(1e-9, time.perf_counter() - self._opened)
        return f"read {self.weights.shards.bytes_read / 1e9:.3g} GB, {rate / 1e6:.3g} MB/s"

    def change(self, place: ExpertsPlace, change: Change) -> None:
        change()
        self.remember(place, change)

    def remember(self, place: ExpertsPlace, change: Change) -> None:
        index, dense = place.index, self._dense[place.index]
        # From now on these stand for the layer's experts. Nobody needs the ones before.
        self._shapes[index] = place.experts
        self._changes[index].append(change)
        if place.experts is not dense:
            self.weights.release(index, dense)

    def _reading(self, layer: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with self.hold([layer]):
                return forward(*args, **kwargs)

        return run

    def _enter(self, layer: int) -> None:
        if self._holders[layer] == 0:
            started = time.perf_counter()
            self._read(layer)
            self.seconds_read += time.perf_counter() - started
        self._holders[layer] += 1

    def _leave(self, layer: int) -> None:
        self._holders[layer] -= 1
        if self._holders[layer] == 0:
            self._release(layer)

    @torch.no_grad()
    def _read(self, layer: int) -> None:
        changes = self._changes.get(layer, [])
        if changes:
            self._places[layer].replace_experts(self._dense[layer])
        self.weights.load(layer)
        for change in changes:
            change()
        if changes:
            self._settle(layer)
        self._read_ahead(layer)

    def _settle(self, layer: int) -> None:
        """Give the module that stands for changed experts their weights, and let the dense ones go."""
        place, shape, dense = self._places[layer], self._shapes[layer], self._dense[layer]
        for name, parameter in place.experts.named_parameters():
            setattr(shape, name, nn.Parameter(parameter.detach(), requires_grad=False))
        place.replace_experts(shape)
        if shape is not dense:
            self.weights.release(layer, dense)

    def _read_ahead(self, layer: int) -> None:
        """The next layer in the direction in which we go."""
        following = layer - 1 if layer < self._last_read else layer + 1
        self._last_read = layer
        if 0 <= following < len(self._holders) and self._holders[following] == 0:
            self.weights.will_need(following)

    def _release(self, layer: int) -> None:
        self.weights.release(layer)
        if self._changes.get(layer):
            shape = self._shapes[layer]
            for name, parameter in shape.named_parameters():
                setattr(shape, name, nn.Parameter(parameter.detach().to("meta"), requires_grad=False))
            self._places[layer].replace_experts(shape)
