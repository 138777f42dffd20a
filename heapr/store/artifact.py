"""An artifact, as the store hands it out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Artifact:
    """A finished result.

    Attributes:
        stage, key, part: which result it is.
        path: its folder; read-only by convention. A part lies in the folder of its artifact.
        cached: whether it was found rather than made.
        seconds: time that finding or making it took.
        peak_memory_bytes: peak memory of the process (of the GPU, if one is used) while it was made; 0 if
            cached.
    """

    stage: str
    key: str
    part: str
    path: Path
    cached: bool
    seconds: float
    peak_memory_bytes: int

    def summary(self) -> dict[str, Any]:
        """Its entry in `summary.json`."""
        return {
            "stage": self.stage,
            "key": self.key,
            "part": self.part,
            "path": str(self.path),
            "cached": self.cached,
            "seconds": round(self.seconds, 3),
            "peak_memory_bytes": self.peak_memory_bytes,
        }
