"""Where a model's files are: built in, in a local folder, or in the cache of the hub.

In: what `model.path` says. Out: a local folder; what it lacks of a hub model is downloaded first.
"""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from heapr.errors import ConfigError
from heapr.files import user_path
from heapr.hub import hub_is_reachable
from heapr.words import first_line

BUILTIN_PREFIX = "builtin:"
BUILTIN_FOLDER = Path(__file__).parent / "builtin"


def find_folder(path: str, revision: str | None, description: list[str], *, has_code: bool) -> Path:
    """Folder with a model's configuration and tokenizer; those of a hub model are downloaded first.

    Raises:
        ConfigError: there is none, or a revision is given for a model that is not on the hub.
    """
    if revision is not None and not is_on_hub(path):
        raise ConfigError(
            f"model.revision='{revision}' is a version on the hub, and model.path='{path}' is not on it;"
            " leave model.revision out, or give a hub id 'owner/name'"
        )
    if path.startswith(BUILTIN_PREFIX):
        return _builtin(path.removeprefix(BUILTIN_PREFIX))
    if is_on_hub(path):
        patterns = [*description, "*.py"] if has_code else description
        return download(path, revision, patterns)
    folder = user_path(path)
    if not folder.is_dir():
        raise ConfigError(
            f"model.path='{path}': no such folder; give a folder with config.json and safetensors, or a hub"
            " id 'owner/name'"
        )
    return folder


def is_on_hub(path: str) -> bool:
    """Whether a path is a hub id and no local folder has that name."""
    return (
        path.count("/") == 1
        and not path.startswith((BUILTIN_PREFIX, "/", ".", "~"))
        and not Path(path).is_dir()
    )


def _builtin(name: str) -> Path:
    """Folder of a built-in model."""
    known = sorted(entry.name for entry in BUILTIN_FOLDER.iterdir() if entry.is_dir())
    if name not in known:
        paths = [BUILTIN_PREFIX + known_name for known_name in known]
        raise ConfigError(
            f"model.path='{BUILTIN_PREFIX}{name}': no such built-in model; known: {', '.join(paths)}"
        )
    return BUILTIN_FOLDER / name


def download(hub_id: str, revision: str | None, patterns: list[str]) -> Path:
    """Folder of a hub model with the files that match the patterns.

    They come from the hub if it can be reached, else from the local cache.
    """
    online = hub_is_reachable()
    try:
        folder = huggingface_hub.snapshot_download(
            hub_id, revision=revision, allow_patterns=patterns, local_files_only=not online
        )
    except LocalEntryNotFoundError:
        raise ConfigError(
            f"model.path='{hub_id}' is neither a local folder nor in the local hub cache, and the hub cannot"
            " be reached; download it where there is a network (hf download) or give a local folder"
        ) from None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ConfigError(f"model.path='{hub_id}' cannot be downloaded: {first_line(error)}") from error
    return Path(folder)
