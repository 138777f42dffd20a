"""What repair has made so far, layer by layer: in memory, or in files that outlive the process.

In: each layer's changed weights and its `LayerRepair`. Out: both, by decoder layer index.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
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
            self._recover(files)

    def _recover(self, files: Files) -> None:
        """Take over what an earlier process left."""
        reports = files.state.get("found", {})
        for key, report in reports.items():
            index = int(key)
            tensors = {}
            for name in files.state["names"]:
                tensors[name] = files.get(_key(index, name))
            self._layers[index] = tensors
            self.found[index] = LayerRepair(**report)

    def __getitem__(self, index: int) -> TensorDict:
        return self._layers[index]

    def __iter__(self) -> Iterator[int]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def forget_all_but(self, layers: Collection[int]) -> None:
        """Keep these layers; the others will be added again."""
        for index in set(self._layers) - set(layers):
            forgotten = self._layers.pop(index)
            for name in forgotten:
                self._shelf.drop(_key(index, name))
            del self.found[index]

    def add(self, index: int, tensors: TensorDict, found: LayerRepair) -> None:
        """Keep a layer's weights; in files, they are there after a crash too."""
        kept = {}
        for name, tensor in tensors.items():
            kept[name] = self._shelf.put(_key(index, name), tensor)
        self._layers[index] = kept
        self.found[index] = found
        if self._files is None:
            return
        reports = {str(number): asdict(report) for number, report in self.found.items()}
        self._files.commit(found=reports, names=list(tensors))


def _key(index: int, name: str) -> str:
    """Name of a layer's tensor on the shelf."""
    return f"{index}-{name}"
