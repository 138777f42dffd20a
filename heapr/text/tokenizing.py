"""Tokenizes text of any length piece by piece, with the same ids as the whole text at once.

In: documents and a tokenizer. Out: ids, int32 (T,). A tokenizer needs more than a hundred bytes for each
character of its input, so it gets overlapping pieces of the text. Two pieces are joined in the middle of
their overlap if both have the same tokens at the same places there; otherwise both are tokenized as one.
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
PIECE = 16_384  # characters per piece, without the context on both sides
CONTEXT = 1_024  # characters of context on each side, which belong to the neighboring pieces
PIECES_AT_ONCE = 4  # pieces per call of the tokenizer
MIN_AGREED = 16  # two pieces are joined if they agree on at least this many tokens


@dataclass(frozen=True)
class Span:
    """A stretch of the text that begins at character `start`."""

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
        places_T: position of each token's first character in the whole text.
        first: number of the first token that is used; those before it come from the previous piece.
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
    """Ids of the documents, joined by blank lines and tokenized as one text, int32 (T,).

    Args:
        documents: every call returns them from the beginning.
        tokenizer: of the model; a slow one (`is_fast` is False) gets the whole text at once.
        num_characters: length of the joined documents.
        what: name of the documents, for the progress bar and the log.
    """
    is_long = num_characters > PIECE
    if is_long and tokenizer.is_fast:
        ids = _ids_by_pieces(documents(), tokenizer, num_characters, what)
        if ids is not None:
            return ids
    if is_long:
        reason = "this tokenizer gives other tokens piece by piece"
        logger.info("%-9s %s is tokenized at once, which takes memory: %s", "corpus", what, reason)
    text = DOCUMENT_SEPARATOR.join(documents())
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int32)


def joined_length(documents: Iterable[str]) -> int:
    """Number of characters of the documents when they are joined by blank lines."""
    num_documents = num_characters = 0
    for document in documents:
        num_documents += 1
        num_characters += len(document)
    num_separators = max(num_documents - 1, 0)
    return num_characters + num_separators * len(DOCUMENT_SEPARATOR)


def _ids_by_pieces(
    documents: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    num_characters: int,
    what: str,
) -> Tensor | None:
    """The same without the whole text in memory; None if the pieces cannot be joined."""
    special = special_ids(tokenizer)
    if special is None:
        return None
    before, behind = special
    num_batches = math.ceil(num_characters / (PIECE * PIECES_AT_ONCE))
    batches = progress(_batches(_spans(documents)), total=num_batches, description=f"tokenize {what}")
    pieces = (piece for spans in batches for piece in _tokenized(spans, tokenizer))
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
    """The joined documents as spans of `PIECE` characters, with `CONTEXT` more on each side."""
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
    """The documents, with the separator between them."""
    for number, document in enumerate(documents):
        if number:
            yield DOCUMENT_SEPARATOR
        yield document


def _batches(spans: Iterator[Span]) -> Iterator[list[Span]]:
    while batch := list(islice(spans, PIECES_AT_ONCE)):
        yield batch


def _tokenized(spans: Sequence[Span], tokenizer: PreTrainedTokenizerBase) -> Iterator[Piece]:
    """Tokenize spans, without special tokens around them."""
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
        ids_T = np.array(ids, dtype=np.int32)
        yield Piece(span, ids_T, places_T)


def _cut(left: Piece, right: Piece) -> tuple[int, int] | None:
    """The token of each piece at which the right one continues the left one; None if they disagree."""
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
    """Tokenize two pieces as one; None if that changes tokens of the left one that were used already.

    Further pieces are added until the text has doubled, so that a long stretch in which pieces disagree is
    not tokenized over and over.
    """
    whole = _joined(left.span, right.span)
    while len(whole.text) < 2 * len(left.span.text):
        piece = next(further, None)
        if piece is None:
            break
        whole = _joined(whole, piece.span)
    (joined,) = _tokenized([whole], tokenizer)
    is_same = np.array_equal(joined.ids_T[: left.first], left.ids_T[: left.first])
    return replace(joined, first=left.first) if is_same else None


def _joined(left: Span, right: Span) -> Span:
    """Join two spans that overlap."""
    num_shared = left.end - right.start
    return Span(left.start, left.text + right.text[num_shared:])


def special_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]] | None:
    """Tokens that the tokenizer adds before and after a text; None if they cannot be found with one word."""
    around = tokenizer("word")["input_ids"]
    own = tokenizer("word", add_special_tokens=False)["input_ids"]
    for begin in range(len(around) - len(own) + 1):
        end = begin + len(own)
        if around[begin:end] == own:
            return around[:begin], around[end:]
    return None
