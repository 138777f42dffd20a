"""Draws documents at random from a text that is longer than wanted.

In: documents, and the number of characters wanted. Out: the drawn documents, in their original order. They
are read anew with each call, so that none are held in memory.
"""

from __future__ import annotations

import logging
import random
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence

logger = logging.getLogger(__name__)

Documents = Callable[[], Iterable[str]]

PASSAGE = 100_000  # characters; longer documents are cut into passages, which count as documents


def drawn(documents: Documents, limit: int, *, seed: int, what: str) -> Documents:
    """Draw documents at random, up to `limit` characters in total; all of them if they have no more.

    Args:
        documents: every call returns them from the beginning.
        limit: characters, at least 1.
        seed: documents are drawn in the order of Python's `random.Random(seed).shuffle`.
        what: name of the documents, for the log.

    Returns:
        a function like `documents`.
    """
    longest = min(PASSAGE, limit)
    # Arrays, because large texts have millions of documents.
    lengths = array("q", map(len, _passages(documents(), longest)))
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
    """Numbers of the first passages in shuffled order, before the one that would exceed the limit."""
    order = array("q", range(len(lengths)))
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
    """The documents, cut into passages of at most `longest` characters, after line ends where possible."""
    for document in documents:
        begin = 0
        while len(document) - begin > longest:
            end = document.rfind("\n", begin, begin + longest) + 1
            if end <= begin:
                end = begin + longest
            yield document[begin:end]
            begin = end
        yield document[begin:]
