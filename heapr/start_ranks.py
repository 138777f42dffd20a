"""From the environment that torchrun, accelerate or srun made to `Ranks`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from heapr.rank_environment import place_of
from heapr.ranks import ONE_PROCESS, Ranks

RANK_IN_LOG = "HEAPR_RANK"  # environment variable for conf/hydra/job_logging/rank.yaml


@contextmanager
def started_ranks() -> Iterator[Ranks]:
    """The ranks that this process is one of, for as long as the context lasts.

    Raises:
        ConfigError: the processes cannot meet, or run different versions of the code.
        RankEnded: see `Ranks.together`.
    """
    place = place_of(os.environ)
    if place is None:
        yield ONE_PROCESS
        return
    if place.rank > 0:
        # Read when tqdm and the hub's library are imported. Otherwise bars of all libraries come out often.
        os.environ["TQDM_DISABLE"] = "1"
        os.environ[RANK_IN_LOG] = str(place.rank)
        os.environ["HF_HUB_OFFLINE"] = "1"  # rank 0 asks the hub
    from heapr.process_group import process_group  # imports torch

    with process_group(place) as ranks:
        yield ranks
