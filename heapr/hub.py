"""The Hugging Face hub: whether it answers, and single files of data sets from its cache or downloaded.

In: names. Out: paths. Without a network little time is lost: the hub is asked once, for a few seconds at
most.
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


# Asked once per process: on a network that drops packets, every attempt takes the whole time.
@functools.lru_cache(maxsize=2)
def _answers(endpoint: str) -> bool:
    return answers(endpoint)


def data_file(repository: str, revision: str, name: str) -> Path | None:
    """Find a data set's file in the local hub cache, or download it.

    Returns:
        its path below `snapshots/<commit>/` of the cache; None if it is not there and the hub cannot be
        reached.

    Raises:
        HfHubHTTPError: the hub has no such data set, revision or file, or refuses it.
    """
    find = functools.partial(hf_hub_download, repository, name, repo_type="dataset", revision=revision)
    try:
        return Path(find(local_files_only=True))
    except LocalEntryNotFoundError:
        if not hub_is_reachable():
            return None
    return Path(find())


@contextmanager
def no_network() -> Iterator[None]:
    """Make the hub's libraries use their caches only, without network and retries; restores the state."""
    import datasets  # takes a second to import, and only zero-shot tasks need it

    previous = huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = previous
