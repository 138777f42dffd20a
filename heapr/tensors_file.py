"""Writes safetensors files whose bytes depend on nothing but their content.

The library's own writer orders several entries of metadata differently from one process to the next, so that
equal results have different hashes. In: tensors. Out: one file that every reader of safetensors accepts.
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
    """Write tensors and metadata.

    With at most one entry of metadata, the bytes are those of `safetensors.torch.save_file`: the length of
    the header (8 bytes, little-endian); the header, JSON, filled up with spaces; then the bytes of every
    tensor, sorted by dtype (the last of `DTYPES` first, so that each is aligned) and then by name. Metadata
    is sorted by name.

    Args:
        path: the file.
        tensors: on any device, with any strides; they are copied to the CPU one at a time.
        metadata: strings by name.
    """
    rank = {dtype: number for number, dtype in enumerate(DTYPES)}
    order = sorted(tensors, key=lambda name: (-rank[tensors[name].dtype], name))
    ordered = {name: tensors[name] for name in order}
    header = _header(ordered, metadata or {})
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little"))
        file.write(header)
        for tensor in ordered.values():
            file.write(_bytes_of(tensor))


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
