"""Looks at artifacts that other processes may be changing at the same time, and says what is wrong with them.

In: an artifact's folder. Out: whether it is intact, and a warning if it is damaged.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

from heapr.sealed import DamagedError
from heapr.store.manifest import MissingError
from heapr.store.verify import Hashes, verify

logger = logging.getLogger(__name__)

LOOKS = 3  # at an artifact that seems damaged, because others may be changing it
LOOK_SECONDS = 0.01  # between them


class Inspector:
    """Tells intact artifacts from others.

    Args:
        hashes: computes hashes of files.
    """

    def __init__(self, hashes: Hashes) -> None:
        self._hashes = hashes
        self._told: set[str] = set()
        self._damaged: set[Path] = set()

    def is_intact(self, path: Path, part: str) -> bool:
        """Whether an artifact, or a part, is what it must be; a warning says what is wrong with it, once."""
        problem = self.problem(path, part)
        if problem and not part:
            self._damaged.add(path)
        if problem and not (part and path in self._damaged):  # which spoils all its parts
            line = f"{path.parent.name} {path.name} is damaged ({problem}); it will be made again"
            if line not in self._told:
                logger.warning("%s", line)
            self._told.add(line)
        return problem is None

    def problem(self, path: Path, part: str) -> str | None:
        """What is wrong with an artifact; empty if it is not there, None if it is intact.

        While another process publishes or rewrites, its files may not fit together for a moment. A problem
        is one only if it is the same at `LOOKS` looks in a row.
        """
        seen: list[str] = []
        while len(seen) < LOOKS:
            try:
                verify(path, part, self._hashes)
                return None
            except MissingError:
                return ""
            except DamagedError as error:
                problem = str(error)
            except FileNotFoundError:  # it was moved between two looks at its files
                problem = "it is gone"
            seen = [*seen, problem] if problem in seen else [problem]
            time.sleep(LOOK_SECONDS)
        return seen[0]
