"""Splits text that has no splits of its own: the hash of a document decides where it belongs.

In: documents. Out: the documents of one split. No document is used both for calibration and for evaluation,
and none both for choosing options (validation) and for reporting results (test).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from heapr.errors import ConfigError

PARTS = {  # which parts each split consists of; every document is in exactly one part
    "train": {"train"},
    "heldout": {"validation", "test"},
    "validation": {"validation"},
    "test": {"test"},
    "all": {"train", "validation", "test"},
}
HELDOUT_BUCKETS = 10  # one document in ten is held out; half of these are the test part


def check_split(split: str) -> str:
    """Return the split if it is one of `PARTS`.

    Raises:
        ConfigError: it is not.
    """
    if split not in PARTS:
        raise ConfigError(f"corpus split '{split}' is unknown; choose one of {', '.join(PARTS)}")
    return split


def select_split(documents: Iterable[str], split: str) -> Iterator[str]:
    """The documents of one split in order, without blank and repeated ones.

    Keeps the hashes of all documents in memory, but not the documents.
    """
    parts = PARTS[split]
    seen: set[bytes] = set()
    for document in documents:
        if not document.strip():
            continue
        digest = hashlib.sha256(document.encode()).digest()
        if digest in seen:
            continue
        seen.add(digest)
        if _part_of(digest) in parts:
            yield document


def share_text(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether two corpora may have documents in common.

    Two splits of one text have documents in common if they have a part in common. A published data set has
    one file per split, so two uses of one local file are the same text, whatever their splits.

    Args:
        first, second: the corpora's identities.
    """
    if _without_split(first) != _without_split(second):
        return False
    is_published = "column" in first
    if is_published:
        return True
    parts_of_first = PARTS.get(first["split"], PARTS["all"])
    parts_of_second = PARTS.get(second["split"], PARTS["all"])
    return not parts_of_first.isdisjoint(parts_of_second)


def _part_of(digest: bytes) -> str:
    """The part that a document belongs to, from its SHA-256."""
    bucket = int.from_bytes(digest[:8], "big") % HELDOUT_BUCKETS
    if bucket != 0:
        return "train"
    return "validation" if digest[8] % 2 == 0 else "test"


def _without_split(identity: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in identity.items() if name != "split"}
