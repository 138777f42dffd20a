"""The files of a model's folder: which ones hold the weights, what is in them, and a hash of them all.

In: a local folder. Out: names, headers, a refusal, or a hash. No weights are loaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from heapr.errors import ConfigError
from heapr.files import LONGEST_NAME, hash_file, hash_files, write_json
from heapr.remembered_hashes import hash_file_once

DESCRIPTION_FILES = [
    "*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", "additional_chat_templates/*.jinja",
]  # fmt: skip
# What transformers looks for, in this order.
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Variants, shards without an index, and files of other tools.
OTHER_WEIGHTS = ["*.safetensors", "*.safetensors.index.*", "*.pt", "*.pth", "*.gguf"]
MAX_HEADER = 100_000_000  # bytes; safetensors' own limit
NOT_JSON = (ValueError, RecursionError)  # what json raises; also for text that is no UTF-8, and for depths

# For each tensor its "dtype" as safetensors names it, its "shape" and its "data_offsets".
Headers = Mapping[str, Mapping[str, Any]]


def weight_files(folder: Path) -> list[str]:
    """The weight files that are loaded, relative to the folder.

    They are those that the index names, wherever they are, or the single file without an index. The list is
    empty if there is neither.

    Raises:
        ConfigError: both are there, or the index is damaged.
    """
    index = folder / INDEX
    if not index.is_file():
        return [WEIGHTS] if (folder / WEIGHTS).is_file() else []
    shards = sorted(shards_of(index))
    if (folder / WEIGHTS).is_file() and shards != [WEIGHTS]:
        raise ConfigError(
            f"the weights in '{folder}' are there twice: {WEIGHTS}, and the {len(shards)} files that {INDEX}"
            " names; only the first would be loaded, so remove whichever is not wanted"
        )
    return shards


def check_weight_files(folder: Path) -> None:
    """Check that every weight file is there and complete, and that no tensor is in two files.

    Raises:
        ConfigError: a check failed; the message names the file.
    """
    names = weight_files(folder)
    if not names and any(folder.glob("*.bin")):
        raise ConfigError(
            f"the weights in '{folder}' are pickled (*.bin), which is not read; convert them to safetensors"
        )
    if not names:
        others = sorted(path.name for pattern in OTHER_WEIGHTS for path in folder.glob(pattern))
        why = f"{others[0]} is not a file that is read" if others else "there are none"
        raise ConfigError(
            f"the weights in '{folder}' cannot be loaded: {why}; put them there as {WEIGHTS}, or as shards"
            f" with {INDEX}"
        )
    where: dict[str, str] = {}
    for name in names:
        if not (folder / name).is_file():
            raise ConfigError(f"the weights in '{folder}' cannot be loaded: {name} is missing; get it again")
        header = read_header(folder / name)
        for tensor in header:
            if tensor in where:
                raise ConfigError(
                    f"the weights in '{folder}' are ambiguous: {tensor} is in {where[tensor]} and in {name};"
                    " get both files again"
                )
            where[tensor] = name


def read_headers(folder: Path) -> Headers:
    """dtype, shape and offsets of every tensor, by its name in the files."""
    headers: dict[str, Mapping[str, Any]] = {}
    for name in weight_files(folder):
        headers |= read_header(folder / name)
    return headers


def shards_of(index: Path) -> set[str]:
    """The files that an index of weights names.

    Raises:
        ConfigError: the index is damaged.
    """
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, *NOT_JSON):
        content = None
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not names or not all(isinstance(name, str) for name in names):
        raise ConfigError(
            f"the weights in '{index.parent}' cannot be loaded: {index.name} is damaged; get it again"
        )
    for name in names:
        if not _is_shard_name(name):
            raise ConfigError(
                f"the weights in '{index.parent}' are not loaded: {index.name} names '{name}', which is not a"
                " file of safetensors in this folder; get both again"
            )
    return set(names)


def _is_shard_name(name: str) -> bool:
    """Whether a name in an index is that of a file of safetensors below the index's folder.

    The file itself may be a link, as in the cache of the hub.
    """
    path = PurePosixPath(name)
    is_inside = not path.is_absolute() and ".." not in path.parts and "\\" not in name and "\0" not in name
    return is_inside and path.suffix == ".safetensors" and len(name) <= LONGEST_NAME


def write_index(folder: Path) -> None:
    """Write an index of weights that are in one file: some tools read every file of tensors otherwise."""
    index = folder / INDEX
    if index.is_file():
        return
    header = read_header(folder / WEIGHTS)
    ends = [entry["data_offsets"][1] for entry in header.values()]
    weight_map = dict.fromkeys(sorted(header), WEIGHTS)
    write_json(index, {"metadata": {"total_size": max(ends)}, "weight_map": weight_map})


def read_header(path: Path) -> dict[str, Mapping[str, Any]]:
    """The header of a safetensors file.

    The file is 8 bytes for the header's length, the header, and the data that it describes.

    Raises:
        ConfigError: the file is damaged, or its length does not match its header.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, MAX_HEADER)))
        size = path.stat().st_size
    except (OSError, *NOT_JSON):
        header, length, size = None, 0, -1
    end = -1
    if isinstance(header, dict):
        header.pop("__metadata__", None)
        if all(map(_is_entry, header.values())):
            end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if end < 0 or size != 8 + length + end:
        raise ConfigError(
            f"the weights in '{path.parent}' cannot be loaded: {path.name} is damaged or not complete; get it"
            " again"
        )
    return dict(header)


def _is_entry(entry: Any) -> bool:
    """Whether an entry of a header has a dtype, a shape and offsets."""
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        return False
    numbers = (entry.get("shape"), entry.get("data_offsets"))
    for values in numbers:
        is_list = isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)
        if not is_list:
            return False
    return len(entry["data_offsets"]) == 2


def hash_folder(folder: Path, digests: Path | None = None, *, has_code: bool = False) -> str:
    """sha256 over the names and contents of the files that make up a model.

    They are configuration, tokenizer, the weights that are loaded, and Python files if they may run.

    Args:
        digests: folder that caches the hashes of weights.
        has_code: whether Python files in the folder may run.
    """
    weights = {folder / name for name in weight_files(folder)}
    described = {path for pattern in DESCRIPTION_FILES for path in folder.glob(pattern)}
    code = set(folder.rglob("*.py")) if has_code else set()

    def hash_one(path: Path) -> str:
        if digests and path in weights:
            return hash_file_once(path, digests)
        return hash_file(path)

    return hash_files(folder, weights | described | code, hash_one)
