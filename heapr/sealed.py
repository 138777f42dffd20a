"""JSON files that carry a checksum of themselves, so that no change of a single bit goes unnoticed.

In: JSON objects. Out: their text with the checksum as its last field, or the object that such a text holds.
"""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CHECKSUM = "checksum"
MAX_BYTES = 64 * 2**20  # far above any file that is written here


class DamagedError(Exception):
    """What is wrong with a file or an artifact, in a few words."""


def sealed_text(value: Mapping[str, Any]) -> str:
    """JSON with the sha256 of all other fields, as they are written, in the last one."""
    content = {name: item for name, item in value.items() if name != CHECKSUM}
    checksum = hashlib.sha256(_text(content).encode()).hexdigest()
    return _text({**content, CHECKSUM: checksum})


def read_sealed(path: Path) -> dict[str, Any]:
    """Read what `sealed_text` gave, without the checksum.

    Raises:
        DamagedError: the file holds anything else.
        OSError: it cannot be read.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for
        raise DamagedError("it is not a file")
    if status.st_size > MAX_BYTES:
        raise DamagedError("it is too large")
    content = path.read_bytes()
    try:
        value = json.loads(content.decode())
    except UnicodeDecodeError as error:
        raise DamagedError("it is not UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise DamagedError("it is not JSON") from error
    if not isinstance(value, dict):
        raise DamagedError("it is not a JSON object")
    if CHECKSUM not in value:
        raise DamagedError("it has no checksum")
    if not _is_as_sealed(value, content):
        raise DamagedError("it does not fit its checksum")
    del value[CHECKSUM]
    return value


def _is_as_sealed(value: Mapping[str, Any], content: bytes) -> bool:
    """Whether these bytes are what `sealed_text` makes of this value."""
    try:
        return sealed_text(value).encode() == content
    except (ValueError, RecursionError):  # such as NaN, which Python reads and JSON does not have
        return False


def _text(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, allow_nan=False) + "\n"
