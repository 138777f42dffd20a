"""Whether the files that a configuration names are there, asked before torch is imported.

In: a model's path, or a configuration. Out: a folder, or a refusal.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from heapr.errors import ConfigError, NotHereError
from heapr.files import user_path

BUILTIN_PREFIX = "builtin:"
BUILTIN_FOLDER = Path(__file__).parent / "model" / "builtin"
CONFIG_FILE, ADAPTER_FILE = "config.json", "adapter_config.json"
TEXT_FILES = "heapr.text.corpora.TextFiles"


def check_inputs(config: Mapping[str, Any], *, texts: bool) -> None:
    """Check that a model in a local folder, and files of text, are there.

    Args:
        config: of an experiment, in JSON types.
        texts: whether to look for files of text too.

    Raises:
        ConfigError: something is not.
    """
    model = config["model"]
    if not is_on_hub(model["path"]):
        folder = local_folder(model["path"], model["revision"])
        if not (folder / ADAPTER_FILE).is_file():  # which has a message of its own
            check_has_config(folder)
    for entry in _entries_of(config, TEXT_FILES) if texts else ():
        paths = entry.get("paths")
        for path in paths if isinstance(paths, list) else ():
            if isinstance(path, str) and not user_path(path).is_dir():
                check_text_file(user_path(path))


def is_on_hub(path: str) -> bool:
    """Whether a path is a hub id and no local folder has that name."""
    return (
        path.count("/") == 1
        and not path.startswith((BUILTIN_PREFIX, "/", ".", "~"))
        and not os.path.isdir(path)  # False where Path.is_dir raises: for names that are too long
    )


def local_folder(path: str, revision: str | None) -> Path:
    """Folder of a model that is built in or in a local folder.

    Raises:
        ConfigError: there is none, or a revision is given, which models on the hub alone have.
    """
    if revision is not None:
        raise ConfigError(
            f"model.revision='{revision}' is a version on the hub, and model.path='{path}' is not on it;"
            " leave model.revision out, or give a hub id 'owner/name'"
        )
    if path.startswith(BUILTIN_PREFIX):
        return _builtin(path.removeprefix(BUILTIN_PREFIX))
    folder = user_path(path)
    if not folder.is_dir():
        raise ConfigError(
            f"model.path='{path}': no such folder; give a folder with config.json and safetensors, or a hub"
            " id 'owner/name'"
        )
    return folder


def check_has_config(folder: Path) -> None:
    """Refuse a folder that holds no model.

    Raises:
        ConfigError: it has no config.json.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise ConfigError(
            f"folder '{folder}' has no config.json, so it is not a Hugging Face model; give a folder that has"
            " one"
        )


def check_text_file(path: Path) -> None:
    """Refuse what is not a file, or an empty one.

    Raises:
        NotHereError: it is not there.
        ConfigError: it is empty.
    """
    what = f"text file '{path}'"
    if not path.is_file():
        raise NotHereError(f"{what} does not exist or is not a file; give the path of a readable file")
    if path.stat().st_size == 0:
        raise ConfigError(f"{what} is empty; give a file with text")


def _builtin(name: str) -> Path:
    """Folder of a built-in model."""
    known = sorted(entry.name for entry in BUILTIN_FOLDER.iterdir() if entry.is_dir())
    if name not in known:
        paths = [BUILTIN_PREFIX + known_name for known_name in known]
        raise ConfigError(
            f"model.path='{BUILTIN_PREFIX}{name}': no such built-in model; known: {', '.join(paths)}"
        )
    return BUILTIN_FOLDER / name


def _entries_of(value: Any, target: str) -> Iterator[Mapping[str, Any]]:
    """Every entry below a value that names a class as its `_target_`."""
    if isinstance(value, Mapping):
        if value.get("_target_") == target:
            yield value
        for item in value.values():
            yield from _entries_of(item, target)
