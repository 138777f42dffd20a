"""Where tensors lie that are needed later: in memory, or in files that outlive the process.

In: tensors under names. Out: the same, from memory or mapped from their files, which the operating system
reads and drops as it sees fit.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from heapr.errors import ConfigError
from heapr.files import make_folder, remove, write_text
from heapr.sealed import DamagedError, read_sealed, sealed_text

logger = logging.getLogger(__name__)

JOURNAL = "journal.json"


class Shelf(Protocol):
    """A place for tensors."""

    def put(self, name: str, tensor: Tensor) -> Tensor:
        """Keep a tensor; return it as it is kept, without its graph."""
        ...

    def drop(self, name: str) -> None:
        """Forget a tensor."""
        ...


class Memory:
    """Tensors stay in memory.

    Args:
        device: where they are kept. With None, where they are.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = device

    def put(self, name: str, tensor: Tensor) -> Tensor:
        return tensor.detach() if self._device is None else tensor.detach().to(self._device)

    def drop(self, name: str) -> None:
        """Whoever holds it forgets it."""


class Spilled:
    """Tensors lie in files without a name, which the operating system frees when the tensors are gone or the
    process ends.

    Args:
        folder: on the disk to use; it is made.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def put(self, name: str, tensor: Tensor) -> Tensor:
        with tempfile.NamedTemporaryFile(dir=self._folder, buffering=0) as file:
            _write(file.fileno(), _bytes_of(tensor))
            return _mapped(file.name, tensor.dtype, tensor.shape)

    def drop(self, name: str) -> None:
        """The file goes with the tensor."""

    def check_room(self, num_bytes: int) -> None:
        """Check that the disk has room for tensors of so many bytes.

        Raises:
            ConfigError: it has not.
        """
        free = shutil.disk_usage(self._folder).free
        if num_bytes > free:
            raise ConfigError(
                f"activations between the layers need {num_bytes / 1e9:.3g} GB, and '{self._folder}' has"
                f" {free / 1e9:.3g} GB free; free some, choose another folder with paths.outputs=..., keep"
                " them in memory with runtime.activations=ram, or measure on fewer sequences"
            )


class Files:
    """Tensors lie in files of one folder, as plain bytes, each with a checksum.

    What `commit` recorded is there again after a crash; everything else is removed when the folder is opened
    next. The record belongs to a description of the work: no other one is used, nor a damaged one.

    Args:
        folder: is made.
        about: describes the work, JSON types only.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        self.folder = folder
        self._about = dict(about)
        self._entries: dict[str, dict[str, Any]] = {}
        self._dropped: list[str] = []
        self.state: dict[str, Any] = {}
        make_folder(folder)
        self._recover()

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __iter__(self) -> Any:
        return iter(list(self._entries))

    def put(self, name: str, tensor: Tensor) -> Tensor:
        """Write a tensor, once; return it mapped from its file."""
        assert name not in self._entries, name
        content = _bytes_of(tensor)
        with (self.folder / name).open("wb", buffering=0) as file:
            _write(file.fileno(), content)
        self._entries[name] = {
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
            "crc32": zlib.crc32(content),
        }
        return self.get(name)

    def get(self, name: str) -> Tensor:
        """A tensor, mapped from its file; it must not be changed."""
        entry = self._entries[name]
        dtype: torch.dtype = getattr(torch, entry["dtype"])
        return _mapped(str(self.folder / name), dtype, torch.Size(entry["shape"]))

    def drop(self, name: str) -> None:
        """Forget a tensor. Its file goes with the next commit, because the record before still names it."""
        if self._entries.pop(name, None) is not None:
            self._dropped.append(name)

    def commit(self, **state: Any) -> None:
        """Record what is there now, and how far the work is, in JSON types."""
        self.state |= state
        record = {"about": self._about, "state": self.state, "tensors": self._entries}
        write_text(self.folder / JOURNAL, sealed_text(record))
        for name in self._dropped:
            if name not in self._entries:
                (self.folder / name).unlink(missing_ok=True)
        self._dropped.clear()

    def _recover(self) -> None:
        """Take over what an earlier process recorded, if it is the same work and undamaged, and remove all
        other files."""
        record = _read_record(self.folder / JOURNAL)
        if record.get("about") == _as_json(self._about) and self._are_intact(record["tensors"]):
            self._entries, self.state = record["tensors"], record["state"]
        for path in self.folder.iterdir():
            if path.name not in self._entries and not (self.state and path.name == JOURNAL):
                remove(path)

    def _are_intact(self, entries: Mapping[str, Mapping[str, Any]]) -> bool:
        for name, entry in entries.items():
            path = self.folder / name
            if not path.is_file() or _crc32(path) != entry["crc32"]:
                logger.warning("'%s' is missing or damaged; all that lay beside it is computed again", path)
                return False
        return True


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _read_record(path: Path) -> dict[str, Any]:
    """What `commit` wrote; empty if it wrote nothing, or that is damaged."""
    try:
        return read_sealed(path)
    except FileNotFoundError:
        return {}
    except (OSError, DamagedError) as error:
        logger.warning("'%s' is damaged (%s); what it told of is computed again", path, error)
        return {}


def _crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    content: memoryview = flat.view(torch.uint8).numpy().data
    return content


def _write(descriptor: int, content: memoryview) -> None:
    done = 0
    while done < len(content):
        done += os.write(descriptor, content[done:])


def _mapped(path: str, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    """A file's content as a tensor, which must not be changed."""
    if not shape.numel():
        return torch.empty(shape, dtype=dtype)
    return torch.from_file(path, shared=True, size=shape.numel(), dtype=dtype).view(shape)
