"""Files of safetensors, the same bytes for the same content.

The library's own writer puts several entries of metadata in another order from one process to the next, so
that equal results have unequal hashes. In: tensors. Out: one file, which every reader of safetensors takes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
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
    """Write tensors and metadata; with at most one entry of metadata, the bytes are those of
    `safetensors.torch.save_file`.

    Args:
        tensors: on any device, of any strides; one is copied to the CPU at a time.
        metadata: strings.
    """
    file = TensorsFile(path, tensors, metadata)
    for name in file:
        file.write(name, tensors[name])


class TensorsFile:
    """A file whose tensors are written one by one, in any order.

    It is 8 bytes, little-endian, with the length of the header; the header, JSON, filled up with spaces; then
    every tensor's bytes, those of the last dtype of `DTYPES` first and then by name, so that each is aligned.
    Metadata is sorted by name.

    Args:
        path: made at once, in its full size.
        shapes: tensors of the shapes and dtypes that will be written; they may be on the meta device.
        metadata: strings.
    """

    def __init__(
        self, path: Path, shapes: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
    ) -> None:
        rank = {dtype: number for number, dtype in enumerate(DTYPES)}
        order = sorted(shapes, key=lambda name: (-rank[shapes[name].dtype], name))
        header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
        self._path, self._ranges, end = path, dict[str, tuple[int, int]](), 0
        for name in order:
            shape, start = shapes[name], end
            end += shape.numel() * shape.dtype.itemsize
            header[name] = {
                "dtype": DTYPES[shape.dtype],
                "shape": list(shape.shape),
                "data_offsets": [start, end],
            }
            self._ranges[name] = (start, end)
        encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        encoded += b" " * (-len(encoded) % ALIGNMENT)
        self._data = 8 + len(encoded)
        with path.open("wb") as file:
            file.write(len(encoded).to_bytes(8, "little") + encoded)
            file.truncate(self._data + end)

    def __iter__(self) -> Iterator[str]:
        """The tensors' names in their order in the file."""
        return iter(self._ranges)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor."""
        content = _bytes_of(tensor)
        start, end = self._ranges[name]
        assert len(content) == end - start, name
        with self._path.open("r+b") as file:
            file.seek(self._data + start)
            file.write(content)


def _bytes_of(tensor: Tensor) -> memoryview:
    """A tensor's content in row-major order."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    content: memoryview = flat.view(torch.uint8).numpy().data
    return content
