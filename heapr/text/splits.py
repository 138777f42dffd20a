"""Splits of text that comes without any: the hash of a document decides where it belongs.

In: documents. Out: the documents of one split. Text that is calibrated on never appears in text that is
evaluated on, and text that options are chosen on (validation) never appears in text that results are reported
on (test).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from heapr.errors import ConfigError

PARTS = {  # the parts that make up each split; every document is in exactly one part
    "train": {"train"},
    "heldout": {"validation", "test"},
    "validation": {"validation"},
    "test": {"test"},
    "all": {"train", "validation", "test"},
}
HELDOUT_BUCKETS = 10  # one document in ten is held out; half of those are for testing


def check_split(split: str) -> str:
    """The split itself.

    Raises:
        ConfigError: it is not one of `PARTS`.
    """
    if split not in PARTS:
        raise ConfigError(f"corpus split '{split}' is unknown; choose one of {', '.join(PARTS)}")
    return split


def select_split(documents: Iterable[str], split: str) -> Iterator[str]:
    """The documents of one split in their order, without blank and repeated ones.

    Holds the hashes of the documents, not the documents.
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

    Two splits of one text share documents if they share a part. The splits of a published data set are
    separate files, so one file is one text, whatever split it is given as.

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
    """The part of a document, from its SHA-256."""
    bucket = int.from_bytes(digest[:8], "big") % HELDOUT_BUCKETS
    if bucket != 0:
        return "train"
    return "validation" if digest[8] % 2 == 0 else "test"


def _without_split(identity: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in identity.items() if name != "split"}
