"""Where a model's files are: built in, in a local folder, or in the cache of the hub.

In: what `model.path` says. Out: a local folder; what it lacks of a hub model is downloaded first.
"""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from heapr.errors import ConfigError
from heapr.hub import hub_is_reachable
from heapr.inputs import is_on_hub, local_folder
from heapr.words import first_line


def find_folder(path: str, revision: str | None, description: list[str], *, has_code: bool) -> Path:
    """Folder with a model's configuration and tokenizer; those of a hub model are downloaded first.

    Raises:
        ConfigError: there is none, or see `local_folder`.
    """
    if is_on_hub(path):
        patterns = [*description, "*.py"] if has_code else description
        return download(path, revision, patterns)
    return local_folder(path, revision)


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
