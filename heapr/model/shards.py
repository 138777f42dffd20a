"""Tensors in the files of a model's folder, read one by one.

In: a folder with safetensors. Out: tensors by their names in the files, each in memory of its own. Files are
read by ranges and never mapped, so that memory holds what was asked for and nothing else.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor

from heapr.errors import ConfigError
from heapr.model.model_files import read_header, weight_files

DTYPES = {  # safetensors' names
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32,
    "F64": torch.float64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip

ALIGNMENT = 64  # bytes, as torch aligns memory
Stamp = tuple[int, int, int]  # of a file: its number, size and time of change


@dataclass(frozen=True)
class Place:
    """Where a tensor is.

    Attributes:
        path: the file.
        start: its first byte in the file.
        dtype, shape: of the tensor.
    """

    path: Path
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Shards:
    """The tensors of a model's files.

    Args:
        folder: with the files that `weight_files` names.

    Raises:
        ConfigError: a file is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.bytes_read = 0
        self._lock = Lock()
        self._places: dict[str, Place] = {}
        self._stamps: dict[Path, Stamp] = {}
        for name in weight_files(folder):
            path = folder / name
            self._stamps[path] = _stamp(os.stat(path))
            self._places |= _places_in(path)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def place(self, name: str) -> Place:
        return self._places[name]

    def read(self, name: str) -> Tensor:
        """A tensor from its file.

        Raises:
            ConfigError: the file is not the one any more whose header was read.
        """
        place = self._places[name]
        memory = torch.empty(place.num_bytes, dtype=torch.uint8)
        return self._read_into(place, memory)

    def read_together(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Tensors that are needed at the same time, in one piece of memory: many small ones would not go back
        to the operating system.

        Raises:
            ConfigError: see `read`.
        """
        places = {name: self._places[name] for name in names}
        starts: dict[str, int] = {}
        end = 0
        for name, place in places.items():
            starts[name] = end
            end += place.num_bytes + -place.num_bytes % ALIGNMENT
        memory = torch.empty(end, dtype=torch.uint8)
        tensors = {}
        for name in sorted(places, key=lambda name: (places[name].path, places[name].start)):
            place, start = places[name], starts[name]
            tensors[name] = self._read_into(place, memory[start : start + place.num_bytes])
        return tensors

    def _read_into(self, place: Place, memory: Tensor) -> Tensor:
        """Fill memory with a tensor's bytes."""
        content: memoryview = memory.numpy().data
        try:
            with place.path.open("rb", buffering=0) as file:
                file.seek(place.start)
                done = 0
                while done < len(content) and (number := file.readinto(content[done:])):
                    done += number
                is_same = _stamp(os.fstat(file.fileno())) == self._stamps[place.path]
        except FileNotFoundError:
            is_same, done = False, 0
        if not is_same or done < len(content):
            raise ConfigError(
                f"'{place.path}' has changed while it was in use; what was finished is kept: put the file"
                " back and start again, or start anew with the changed model"
            )
        with self._lock:
            self.bytes_read += done
        return memory.view(place.dtype).view(place.shape)

    def will_need(self, names: Iterable[str]) -> None:
        """Ask the operating system, where it can be asked, to have tensors ready in its cache."""
        if not hasattr(os, "posix_fadvise"):
            return
        for path, ranges in self._ranges(names).items():
            try:
                descriptor = os.open(path, os.O_RDONLY)
            except OSError:  # `read` will say so
                continue
            try:
                for start, length in ranges:
                    os.posix_fadvise(descriptor, start, length, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(descriptor)

    def _ranges(self, names: Iterable[str]) -> dict[Path, list[tuple[int, int]]]:
        """Start and length of what neighbouring tensors take, by file."""
        ranges: dict[Path, list[tuple[int, int]]] = {}
        places = sorted((self._places[name] for name in names), key=lambda place: (place.path, place.start))
        for place in places:
            known = ranges.setdefault(place.path, [])
            if known and sum(known[-1]) == place.start:
                known[-1] = (known[-1][0], known[-1][1] + place.num_bytes)
            else:
                known.append((place.start, place.num_bytes))
        return ranges


def _places_in(path: Path) -> dict[str, Place]:
    """The tensors of one file. Its data begin behind 8 bytes for the header's length and the header."""
    header = read_header(path)
    with path.open("rb") as file:
        first = 8 + int.from_bytes(file.read(8), "little")
    places = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:  # of a quantised weight, which `check_tensors` refuses if it is used
            continue
        start = first + int(entry["data_offsets"][0])
        places[name] = Place(path, start, DTYPES[entry["dtype"]], tuple(entry["shape"]))
    return places


def _stamp(status: os.stat_result) -> Stamp:
    return status.st_ino, status.st_size, status.st_mtime_ns
