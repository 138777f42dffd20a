"""Tokenises text of any length piece by piece, with the ids that the whole text would give.

In: documents and a tokenizer. Out: int32 (T,) ids. A tokenizer needs a hundred bytes and more for each
character of its input, so it gets overlapping pieces of the text. One piece continues another if both have
the same tokens at the same places all through the middle of their overlap; where they differ, both are
tokenised as one.
Shape letters: T tokens.
"""

from __future__ import annotations

import logging
import math
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from heapr.progress import progress

logger = logging.getLogger(__name__)

DOCUMENT_SEPARATOR = "\n\n"  # docs/method.md: documents are joined by blank lines
PIECE = 16_384  # characters of a piece, without what it shares with its neighbours
CONTEXT = 1_024  # characters of each neighbour that a piece has too
PIECES_AT_ONCE = 4  # tokenised in one call
MIN_AGREED = 16  # tokens that two pieces must have in common


@dataclass(frozen=True)
class Span:
    """Characters of the text, from the place `start` on."""

    start: int
    text: str

    @property
    def end(self) -> int:
        return self.start + len(self.text)


@dataclass(frozen=True)
class Piece:
    """A span of the text and its tokens.

    Attributes:
        span: the characters.
        ids_T: the tokens.
        places_T: where each token's first character is in the whole text.
        first: number of the first token that is not taken from the piece before.
    """

    span: Span
    ids_T: NDArray[np.int32]
    places_T: NDArray[np.int64]
    first: int = 0


def token_ids(
    documents: Callable[[], Iterable[str]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_characters: int,
    what: str,
) -> Tensor:
    """Ids of the documents, joined by blank lines and tokenised as one text, int32 (T,).

    Args:
        documents: gives them anew with each call.
        tokenizer: it gets the whole text at once if it cannot tell the places of tokens (`is_fast` is False).
        num_characters: of the joined documents.
        what: what the documents are, for the progress bar and the log.
    """
    is_long = num_characters > PIECE
    if is_long and tokenizer.is_fast:
        ids = _ids_by_pieces(documents(), tokenizer, num_characters, what)
        if ids is not None:
            return ids
    if is_long:
        reason = "its tokenizer does not go together piece by piece"
        logger.info("%-9s %s is tokenised at once, which takes memory: %s", "corpus", what, reason)
    text = DOCUMENT_SEPARATOR.join(documents())
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int32)


def joined_length(documents: Iterable[str]) -> int:
    """Characters of the documents when they are joined by blank lines."""
    lengths = [len(document) for document in documents]
    num_separators = max(len(lengths) - 1, 0)
    return sum(lengths) + num_separators * len(DOCUMENT_SEPARATOR)


def _ids_by_pieces(
    documents: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    num_characters: int,
    what: str,
) -> Tensor | None:
    """The same without holding all of the text; None where the tokens of the pieces do not go together."""
    special = _special_ids(tokenizer)
    if special is None:
        return None
    before, behind = special
    num_batches = math.ceil(num_characters / (PIECE * PIECES_AT_ONCE))
    batches = progress(_batches(_spans(documents)), total=num_batches, description=f"tokenise {what}")
    pieces = (piece for spans in batches for piece in _tokenised(spans, tokenizer))
    ids = array("i", before)
    current = next(pieces)
    for following in pieces:
        cut = _cut(current, following)
        if cut is None:
            joined = _as_one(current, following, pieces, tokenizer)
            if joined is None:
                return None
            current = joined
            continue
        last, first = cut
        ids.frombytes(current.ids_T[current.first : last].tobytes())
        current = replace(following, first=first)
    ids.frombytes(current.ids_T[current.first :].tobytes())
    ids.extend(behind)
    return torch.frombuffer(ids, dtype=torch.int32)


def _spans(documents: Iterable[str]) -> Iterator[Span]:
    """The joined documents in spans of PIECE characters with CONTEXT on each side."""
    length = PIECE + 2 * CONTEXT
    text, start = "", 0
    waiting: list[str] = []
    num_waiting = 0
    for part in _with_separators(documents):
        waiting.append(part)
        num_waiting += len(part)
        if num_waiting < length:
            continue
        text += "".join(waiting)
        waiting, num_waiting = [], 0
        position = 0
        while len(text) - position > length:
            yield Span(start + position, text[position : position + length])
            position += PIECE
        text, start = text[position:], start + position
    yield Span(start, text + "".join(waiting))


def _with_separators(documents: Iterable[str]) -> Iterator[str]:
    """The documents, and what stands between them when they are joined."""
    for number, document in enumerate(documents):
        if number:
            yield DOCUMENT_SEPARATOR
        yield document


def _batches(spans: Iterator[Span]) -> Iterator[list[Span]]:
    while batch := list(islice(spans, PIECES_AT_ONCE)):
        yield batch


def _tokenised(spans: Sequence[Span], tokenizer: PreTrainedTokenizerBase) -> Iterator[Piece]:
    """Pieces without special tokens around them."""
    texts = [span.text for span in spans]
    found = tokenizer(
        texts,
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    for span, ids, places in zip(spans, found["input_ids"], found["offset_mapping"], strict=True):
        starts = (place for place, _ in places)
        places_T = np.fromiter(starts, dtype=np.int64, count=len(places)) + span.start
        yield Piece(span, np.array(ids, dtype=np.int32), places_T)


def _cut(left: Piece, right: Piece) -> tuple[int, int] | None:
    """Where the right piece continues the left one: the number of a token in each. None if they disagree."""
    middle = (right.span.start + left.span.end) // 2
    bounds = [middle - CONTEXT // 2, middle + CONTEXT // 2]
    left_begin, left_end = np.searchsorted(left.places_T, bounds)
    right_begin, right_end = np.searchsorted(right.places_T, bounds)
    left_shared, right_shared = slice(left_begin, left_end), slice(right_begin, right_end)
    is_same = np.array_equal(left.ids_T[left_shared], right.ids_T[right_shared])
    is_at_same_places = np.array_equal(left.places_T[left_shared], right.places_T[right_shared])
    num_agreed = left_end - left_begin
    if not (is_same and is_at_same_places) or num_agreed < MIN_AGREED or left_begin < left.first:
        return None
    return int(left_begin + num_agreed // 2), int(right_begin + num_agreed // 2)


def _as_one(
    left: Piece,
    right: Piece,
    further: Iterator[Piece],
    tokenizer: PreTrainedTokenizerBase,
) -> Piece | None:
    """Two pieces tokenised together; None if that changes the tokens already taken from the left one.

    Further pieces are added until the text has doubled, so that a long run in which pieces disagree is not
    tokenised over and over.
    """
    whole = _joined(left.span, right.span)
    while len(whole.text) < 2 * len(left.span.text):
        piece = next(further, None)
        if piece is None:
            break
        whole = _joined(whole, piece.span)
    (joined,) = _tokenised([whole], tokenizer)
    is_same = np.array_equal(joined.ids_T[: left.first], left.ids_T[: left.first])
    return replace(joined, first=left.first) if is_same else None


def _joined(left: Span, right: Span) -> Span:
    """Two spans that overlap, as one."""
    num_shared = left.end - right.start
    return Span(left.start, left.text + right.text[num_shared:])


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]] | None:
    """Tokens that the tokenizer adds before and after a text; None if a word does not tell them."""
    around = tokenizer("word")["input_ids"]
    own = tokenizer("word", add_special_tokens=False)["input_ids"]
    for begin in range(len(around) - len(own) + 1):
        end = begin + len(own)
        if around[begin:end] == own:
            return around[:begin], around[end:]
    return None
