"""The files of a model's folder: whether its weights are whole, and a hash of all that makes it what it is.

In: a local folder. Out: a refusal, or a hash. No weights are loaded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from heapr.errors import ConfigError
from heapr.files import hash_file, hash_file_once

DESCRIPTION_FILES = ["*.json", "*.model", "*.txt", "*.jinja"]
WEIGHT_FILES = ["*.safetensors"]
MAX_HEADER = 100_000_000  # bytes; safetensors' own limit


def check_weight_files(folder: Path) -> None:
    """Every shard that the index names is there, and every safetensors file has the length that its header says.

    Raises:
        ConfigError: naming the file.
    """
    shards = {path.name for path in folder.glob("*.safetensors")}
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = shards_of(index)
    elif not shards and any(folder.glob("*.bin")):
        raise ConfigError(f"the weights in '{folder}' are pickled (*.bin), which is not read; convert them to safetensors")
    for name in sorted(shards):
        if not (folder / name).is_file():
            raise ConfigError(f"the weights in '{folder}' cannot be loaded: {name} is missing; get it again")
        if (folder / name).stat().st_size != _length_by_header(folder / name):
            raise ConfigError(f"the weights in '{folder}' cannot be loaded: {name} is damaged or not complete; get it again")


def shards_of(index: Path) -> set[str]:
    """Files that an index of weights names.

    Raises:
        ConfigError: it is damaged.
    """
    try:
        return {str(name) for name in json.loads(index.read_text())["weight_map"].values()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"the weights in '{index.parent}' cannot be loaded: {index.name} is damaged; get it again") from error


def _length_by_header(path: Path) -> int:
    """Bytes of a safetensors file: 8 for the header's length, the header, and the data that it describes; -1 if unreadable."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(min(length, MAX_HEADER)))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError):
            return -1
    return 8 + length + int(max(ends, default=0))


def hash_folder(folder: Path, digests: Path | None = None, more: Sequence[str] = ()) -> str:
    """sha256 over names and contents of the files that make a model: configuration, weights, tokenizer, and more patterns."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in [*DESCRIPTION_FILES, *WEIGHT_FILES, *more] for path in folder.glob(pattern)):
        remembered = digests is not None and path.suffix == ".safetensors"
        content = hash_file_once(path, digests) if remembered and digests else hash_file(path)
        digest.update(f"{path.name}\0{content}\0".encode())
    return digest.hexdigest()
