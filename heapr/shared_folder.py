"""A folder that several machines share: whether all ranks see it, and when they see a change.

In: the folder, and the ranks. Out: nothing, or one line about the rank that does not see it.
"""

from __future__ import annotations

import secrets
import socket
import time
from collections.abc import Callable
from pathlib import Path

from heapr.errors import ConfigError
from heapr.ranks import Ranks

LOOK_SECONDS = 5.0  # for a new file in the folder
SEEN_SECONDS = 120.0  # in which a shared file system shows one machine what another one has written


def check_is_shared(folder: Path, ranks: Ranks) -> None:
    """Check that all ranks see the folder of rank 0, by a file that it makes.

    Raises:
        ConfigError: one does not; the message names it.
    """
    if ranks.size == 1:
        return
    token = folder / f".seen-by-all-{ranks.of_first(secrets.token_hex(8))}"
    if ranks.is_first:
        token.touch()
    ranks.barrier()
    seen = ranks.gather([socket.gethostname(), _appears(token.is_file, LOOK_SECONDS)])
    if ranks.is_first:
        token.unlink()
    blind = [f"rank {rank} on {host}" for rank, (host, sees) in enumerate(seen) if not sees]
    if blind:
        raise ConfigError(
            f"{', '.join(blind)} cannot see '{folder}' of rank 0; give a folder that all machines share, with"
            " paths.outputs=..."
        )


def wait_to_see(path: Path, is_there: Callable[[], bool], ranks: Ranks) -> None:
    """Wait until the file system shows another rank what rank 0 has written.

    Raises:
        ConfigError: it does not.
    """
    if not ranks.is_first and not _appears(is_there, SEEN_SECONDS):
        raise ConfigError(
            f"rank {ranks.rank} on {socket.gethostname()} does not see '{path}', which rank 0 wrote"
            f" {SEEN_SECONDS:.0f} s ago; give a folder that all machines share, with paths.outputs=..."
        )


def _appears(is_there: Callable[[], bool], seconds: float) -> bool:
    """Whether something becomes true within so many seconds."""
    limit = time.monotonic() + seconds
    while not is_there():
        if time.monotonic() > limit:
            return False
        time.sleep(0.2)
    return True
