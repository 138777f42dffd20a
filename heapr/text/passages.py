"""Draws documents from a text that is longer than wanted.

In: documents, and how many characters of them are wanted. Out: the documents drawn, in their old order. They
are read again each time, so that none are held in memory.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable, Iterator, Sequence

logger = logging.getLogger(__name__)

Documents = Callable[[], Iterable[str]]

PASSAGE = 100_000  # characters; a longer document is drawn in passages, as if each were a document


def drawn(documents: Documents, limit: int, *, seed: int, what: str) -> Documents:
    """Documents in random order until all together have `limit` characters; all of them if they have fewer.

    Args:
        documents: gives them anew with each call.
        limit: characters, at least 1.
        seed: the order is that of Python's `random.Random(seed).shuffle`.
        what: what the documents are, for the log.
    """
    longest = min(PASSAGE, limit)
    lengths = [len(passage) for passage in _passages(documents(), longest)]
    if sum(lengths) <= limit:
        return documents
    chosen = _choose(lengths, limit, seed)
    chosen_lengths = [lengths[number] for number in chosen]
    logger.info(
        "%-9s %s: %d characters, above calibration.max_characters=%d; "
        "%d of %d documents or passages drawn with seed %d, %d characters",
        "corpus", what, sum(lengths), limit, len(chosen), len(lengths), seed, sum(chosen_lengths),
    )  # fmt: skip

    def read() -> Iterator[str]:
        for number, passage in enumerate(_passages(documents(), longest)):
            if number in chosen:
                yield passage

    return read


def _choose(lengths: Sequence[int], limit: int, seed: int) -> set[int]:
    """Numbers of the passages that come first in the shuffled order, up to the one that exceeds the limit."""
    order = list(range(len(lengths)))
    random.Random(seed).shuffle(order)
    chosen: set[int] = set()
    num_characters = 0
    for number in order:
        num_characters += lengths[number]
        if num_characters > limit:
            break
        chosen.add(number)
    return chosen


def _passages(documents: Iterable[str], longest: int) -> Iterator[str]:
    """The documents. A longer one is cut after line ends; a longer line is cut anywhere."""
    for document in documents:
        begin = 0
        while len(document) - begin > longest:
            end = document.rfind("\n", begin, begin + longest) + 1
            if end <= begin:
                end = begin + longest
            yield document[begin:end]
            begin = end
        yield document[begin:]
