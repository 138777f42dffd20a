"""Files of safetensors, the same bytes for the same content.

The library's own writer puts several entries of metadata in another order from one process to the next, so
that equal results have unequal hashes. In: tensors. Out: one file, which every reader of safetensors takes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
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

    The file is 8 bytes, little-endian, with the length of the header; the header, JSON, filled up with
    spaces; then every tensor's bytes, those of the last dtype of `DTYPES` first and then by name, so that
    each is aligned. Metadata is sorted by name.

    Args:
        tensors: on any device, of any strides; one is copied to the CPU at a time.
        metadata: strings.
    """
    rank = {dtype: number for number, dtype in enumerate(DTYPES)}
    order = sorted(tensors, key=lambda name: (-rank[tensors[name].dtype], name))
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for name in order:
        tensor, start = tensors[name], end
        end += tensor.numel() * tensor.dtype.itemsize
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in order:
            file.write(_bytes_of(tensors[name]))


def _bytes_of(tensor: Tensor) -> memoryview:
    """A tensor's content in row-major order."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    content: memoryview = flat.view(torch.uint8).numpy().data
    return content
