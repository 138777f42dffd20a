"""What determines a result, and the key that follows from it.

In: stage, version, resolved configuration, keys of upstream artifacts. Out: an `Origin` with its key, the
same in every process and on every machine.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LARGEST_EXACT = 2**53  # up to here, every whole number is a float
KEY_LENGTH = 16  # hexadecimal digits: 64 bits


@dataclass(frozen=True)
class Origin:
    """Everything that determines a result.

    Attributes:
        stage, version: which code makes it; a change of the code that changes results raises the version.
        config: resolved configuration of the stage, JSON types only.
        upstream: keys of the artifacts that it is made from, by stage.
    """

    stage: str
    version: int
    config: Mapping[str, Any]
    upstream: Mapping[str, str]

    @property
    def key(self) -> str:
        """Hash of all of it, `KEY_LENGTH` hexadecimal digits."""
        content = {
            "stage": self.stage,
            "version": self.version,
            "config": self.config,
            "upstream": self.upstream,
        }
        return hashlib.sha256(canonical_json(content).encode()).hexdigest()[:KEY_LENGTH]


def canonical_json(value: Any) -> str:
    """JSON that is the same text for equal values: keys sorted, floats rounded to 12 significant digits.

    The rounding removes noise in the last digits, such as 0.6000000000000001. A whole number is the same as
    int and as float.
    """
    return json.dumps(canonical(value), sort_keys=True, separators=(",", ":"), allow_nan=False)


def canonical(value: Any) -> Any:
    """A JSON value as `canonical_json` writes it, except for the order of keys."""
    if isinstance(value, float):
        rounded = float(f"{value:.12g}")
        is_whole = rounded.is_integer() and abs(rounded) < LARGEST_EXACT
        return int(rounded) if is_whole else rounded
    if isinstance(value, Mapping):
        return {str(key): canonical(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [canonical(item) for item in value]
    return value
