"""What repair has made so far, layer by layer: in memory, or in files that outlive the process.

In: each layer's changed weights and its `LayerRepair`. Out: both, by decoder layer index.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict

from heapr.model.shelf import Files, Memory
from heapr.pruning.layer_repair import LayerRepair
from heapr.types import TensorDict


class RepairedLayers(Mapping[int, TensorDict]):
    """The weights that repair changed, by decoder layer index and name.

    Args:
        files: keep the weights there, and go on from what they hold. None keeps them in memory.

    Attributes:
        found: what the repair reports for each layer.
    """

    def __init__(self, files: Files | None = None) -> None:
        self.found: dict[int, LayerRepair] = {}
        self._files = files
        self._shelf = Memory() if files is None else files
        self._layers: dict[int, TensorDict] = {}
        if files is not None:
            for index, report in files.state.get("found", {}).items():
                names = files.state["names"]
                self._layers[int(index)] = {name: files.get(f"{index}-{name}") for name in names}
                self.found[int(index)] = LayerRepair(**report)

    def __getitem__(self, index: int) -> TensorDict:
        return self._layers[index]

    def __iter__(self) -> Iterator[int]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def add(self, index: int, tensors: TensorDict, found: LayerRepair) -> None:
        """Keep a layer's weights; in files, they are there after a crash too."""
        kept = {name: self._shelf.put(f"{index}-{name}", tensor) for name, tensor in tensors.items()}
        self._layers[index] = kept
        self.found[index] = found
        if self._files is not None:
            reports = {str(number): asdict(report) for number, report in self.found.items()}
            self._files.commit(found=reports, names=list(tensors))
