"""The Hugging Face hub: whether it answers, and single files of data sets, from the local cache or
downloaded.

In: names. Out: paths. Without a network nothing waits: the hub is asked once, for a few seconds at most.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import LocalEntryNotFoundError

from heapr.network import answers


def hub_is_reachable() -> bool:
    """Whether the hub answers; false if HF_HUB_OFFLINE is set."""
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return False
    return _answers(huggingface_hub.constants.ENDPOINT)


# Asked once a process: where packets are dropped, every question takes the whole time.
@functools.lru_cache(maxsize=2)
def _answers(endpoint: str) -> bool:
    return answers(endpoint)


def data_file(repository: str, revision: str, name: str) -> Path | None:
    """A data set's file below `snapshots/<commit>/` of the local hub cache, downloaded if it is not there
    yet.

    Returns:
        none if it is not there and the hub cannot be reached.

    Raises:
        HfHubHTTPError: the hub has no such data set, revision or file, or refuses it.
    """
    try:
        return Path(
            hf_hub_download(repository, name, repo_type="dataset", revision=revision, local_files_only=True)
        )
    except LocalEntryNotFoundError:
        if not hub_is_reachable():
            return None
    return Path(hf_hub_download(repository, name, repo_type="dataset", revision=revision))


@contextmanager
def no_network() -> Iterator[None]:
    """The hub's libraries look into their caches only, without asking and retrying; restores."""
    import datasets  # a second to import: only where data sets are loaded through it

    previous = huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = previous
