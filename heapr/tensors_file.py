"""Writes safetensors files whose bytes depend on nothing but their content.

The library's own writer orders several entries of metadata differently from one process to the next, so that
equal results have different hashes. In: tensors. Out: one file that every reader of safetensors accepts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

DTYPES = {  # in the library's order, narrowest first
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16",
    torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int32: "I32", torch.float32: "F32", torch.float64: "F64", torch.int64: "I64",
}  # fmt: skip
ALIGNMENT = 8  # bytes: where the data begins


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors and metadata.

    With at most one entry of metadata, the bytes are those of `safetensors.torch.save_file`.

    Args:
        path: the file.
        tensors: on any device, with any strides; they are copied to the CPU one at a time.
        metadata: strings by name.
    """
    file = TensorsFile(path, tensors, metadata)
    for name in file.names:
        file.write(name, tensors[name])


class TensorsFile:
    """A file of safetensors whose tensors are written one by one, in any order.

    It holds the length of the header (8 bytes, little-endian); the header, JSON, filled up with spaces; then
    the bytes of every tensor, sorted by dtype (the last of `DTYPES` first, so that each is aligned) and then
    by name. Metadata is sorted by name.

    Args:
        path: the file; it is made at once in its full size.
        shapes: tensors of the shapes and dtypes that will be written; they may be on the meta device.
        metadata: strings by name.
    """

    def __init__(
        self, path: Path, shapes: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
    ) -> None:
        rank = {dtype: number for number, dtype in enumerate(DTYPES)}
        self.names = sorted(shapes, key=lambda name: (-rank[shapes[name].dtype], name))
        in_order = {name: shapes[name] for name in self.names}
        header = _header(in_order, metadata or {})
        self._path = path
        self._starts: dict[str, int] = {}
        end = 8 + len(header)
        for name in self.names:
            self._starts[name] = end
            end += shapes[name].nbytes
        with path.open("wb") as file:
            file.write(len(header).to_bytes(8, "little"))
            file.write(header)
            file.truncate(end)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor, of the shape and dtype that were announced."""
        with self._path.open("r+b") as file:
            file.seek(self._starts[name])
            file.write(_bytes_of(tensor))


def save_layers(
    path: Path, layers: Mapping[int, Mapping[str, Tensor]], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors as `layers.<index>.<name>`, with those of one layer in memory at a time.

    Args:
        path: the file.
        layers: tensors by layer index and name; each layer is asked for twice.
        metadata: strings by name.
    """
    shapes = {}
    for index, tensors in layers.items():
        for name, tensor in tensors.items():
            shapes[f"layers.{index}.{name}"] = torch.empty_like(tensor, device="meta")
    file = TensorsFile(path, shapes, metadata)
    for index, tensors in layers.items():
        for name, tensor in tensors.items():
            file.write(f"layers.{index}.{name}", tensor)


class LayersFile(Mapping[int, dict[str, Tensor]]):
    """The tensors of a file that `save_layers` wrote, each layer's read when it is asked for."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._names: dict[int, list[str]] = {}
        with safe_open(path, framework="pt") as file:
            for key in sorted(file.keys()):
                _, index, name = key.split(".", maxsplit=2)
                self._names.setdefault(int(index), []).append(name)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        names = self._names[index]
        with safe_open(self._path, framework="pt") as file:
            return {name: file.get_tensor(f"layers.{index}.{name}") for name in names}

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self._names))

    def __len__(self) -> int:
        return len(self._names)


def _header(ordered: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Where each tensor is, with its dtype and shape."""
    header: dict[str, object] = {}
    if metadata:
        header["__metadata__"] = dict(sorted(metadata.items()))
    end = 0
    for name, tensor in ordered.items():
        start, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return encoded + b" " * (-len(encoded) % ALIGNMENT)


def _bytes_of(tensor: Tensor) -> memoryview:
    """A tensor's content in row-major order."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    content: memoryview = flat.view(torch.uint8).numpy().data
    return content
