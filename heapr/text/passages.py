"""Of more text than is wanted, a part: documents drawn by a seed.

In: documents and how many characters of them are wanted. Out: those drawn, in the order in which they came. They are read
anew each time, so that none are held.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable, Iterator

logger = logging.getLogger(__name__)

Documents = Callable[[], Iterable[str]]

PASSAGE = 100_000  # characters: a longer document is drawn in passages of at most so many, as if each were a document


def drawn(documents: Documents, limit: int, *, seed: int, what: str) -> Documents:
    """Documents in an order that the seed gives, as long as all together have at most `limit` characters; all of them if they have.

    Args:
        documents: gives them anew with each call.
        limit: characters, at least 1.
        seed: of the draw, Python's `random.Random(seed).shuffle`.
        what: they are, for the log.
    """
    longest = min(PASSAGE, limit)
    lengths = [len(passage) for passage in _passages(documents(), longest)]
    if sum(lengths) <= limit:
        return documents
    order = list(range(len(lengths)))
    random.Random(seed).shuffle(order)
    chosen, num_characters = set[int](), 0
    for number in order:
        if num_characters + lengths[number] > limit:
            break
        chosen.add(number)
        num_characters += lengths[number]
    logger.info(
        "%-9s %s: %d characters, above calibration.max_characters=%d; %d of %d documents or passages drawn with seed %d, %d characters",
        "corpus", what, sum(lengths), limit, len(chosen), len(lengths), seed, num_characters,
    )  # fmt: skip
    return lambda: (passage for number, passage in enumerate(_passages(documents(), longest)) if number in chosen)


def _passages(documents: Iterable[str], longest: int) -> Iterator[str]:
    """Documents; one that is longer is cut behind line ends, or, where a line is longer still, within it."""
    for document in documents:
        begin = 0
        while len(document) - begin > longest:
            end = document.rfind("\n", begin, begin + longest) + 1
            end = end if end > begin else begin + longest
            yield document[begin:end]
            begin = end
        yield document[begin:]
