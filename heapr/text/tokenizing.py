"""Text of any length into token ids, piece by piece, with the ids that the whole text would give.

In: documents and a tokenizer. Out: int32 (T,) ids. A tokenizer needs a hundred bytes and more for each character that it is given at
once. So it is given overlapping pieces, and one piece goes on where the one before stops only if both have the same tokens at the same
places all through the middle of what they share; where they do not, they are tokenised as one.
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
CONTEXT = 1_024  # characters of its neighbour that it has on each side
PIECES_AT_ONCE = 4  # tokenised side by side
MIN_AGREED = 16  # tokens that two pieces must have in common


@dataclass(frozen=True)
class Piece:
    """A part of the text.

    Attributes:
        start: place of its first character in the whole text.
        text: its characters.
        ids_T: its tokens.
        places_T: of their first characters in the whole text.
        first: the first of its tokens that is not taken from the piece before.
    """

    start: int
    text: str
    ids_T: NDArray[np.int32]
    places_T: NDArray[np.int64]
    first: int = 0

    @property
    def end(self) -> int:
        return self.start + len(self.text)


def token_ids(documents: Callable[[], Iterable[str]], tokenizer: PreTrainedTokenizerBase, *, num_characters: int, what: str) -> Tensor:
    """Ids of the documents, joined by blank lines and tokenised as one text, int32 (T,).

    Args:
        documents: gives them anew with each call.
        tokenizer: one that does not tell the places of tokens (`is_fast` is False) is given the whole text at once.
        num_characters: of the joined documents.
        what: they are, for the progress bar.
    """
    if num_characters > PIECE and tokenizer.is_fast:
        ids = _ids_by_pieces(documents(), tokenizer, num_characters, what)
        if ids is not None:
            return ids
    if num_characters > PIECE:
        logger.info("%-9s %s is tokenised at once, which takes memory: its tokenizer does not go together piece by piece", "corpus", what)
    text = DOCUMENT_SEPARATOR.join(documents())
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int32)


def _ids_by_pieces(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, num_characters: int, what: str) -> Tensor | None:
    """The same, without ever holding all of the text; None where pieces do not go together."""
    special = _special_ids(tokenizer)
    if special is None:
        return None
    num_batches = math.ceil(num_characters / (PIECE * PIECES_AT_ONCE))
    batches = progress(_batches(_spans(documents)), total=num_batches, description=f"tokenise {what}")
    pieces = (piece for spans in batches for piece in _tokenised(spans, tokenizer))
    ids = array("i", special[0])
    current = next(pieces)
    for following in pieces:
        cut = _cut(current, following)
        if cut is not None:
            ids.frombytes(current.ids_T[current.first : cut[0]].tobytes())
            current = replace(following, first=cut[1])
            continue
        joined = _as_one(current, following, pieces, tokenizer)
        if joined is None:
            return None
        current = joined
    ids.frombytes(current.ids_T[current.first :].tobytes())
    ids.extend(special[1])
    return torch.frombuffer(ids, dtype=torch.int32)


def joined_length(documents: Iterable[str]) -> int:
    """Characters of the documents when they are joined by blank lines."""
    lengths = [len(document) for document in documents]
    return sum(lengths) + len(DOCUMENT_SEPARATOR) * max(len(lengths) - 1, 0)


def _spans(documents: Iterable[str]) -> Iterator[tuple[int, str]]:
    """Start and characters of every piece of the joined documents: PIECE, and CONTEXT on each side."""
    length = PIECE + 2 * CONTEXT
    text, start = "", 0
    waiting: list[str] = []
    num_waiting = 0
    for number, document in enumerate(documents):
        parts = [DOCUMENT_SEPARATOR, document] if number else [document]
        waiting += parts
        num_waiting += sum(map(len, parts))
        if num_waiting < length:
            continue
        text, waiting, num_waiting, position = text + "".join(waiting), [], 0, 0
        while len(text) - position > length:
            yield start + position, text[position : position + length]
            position += PIECE
        text, start = text[position:], start + position
    yield start, text + "".join(waiting)


def _batches(spans: Iterator[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    while batch := list(islice(spans, PIECES_AT_ONCE)):
        yield batch


def _tokenised(spans: Sequence[tuple[int, str]], tokenizer: PreTrainedTokenizerBase) -> Iterator[Piece]:
    """Pieces without special tokens around them."""
    texts = [text for _, text in spans]
    found = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False)
    for (start, text), ids, places in zip(spans, found["input_ids"], found["offset_mapping"], strict=True):
        starts_T = np.fromiter((place for place, _ in places), dtype=np.int64, count=len(places))
        yield Piece(start, text, np.array(ids, dtype=np.int32), starts_T + start)


def _cut(left: Piece, right: Piece) -> tuple[int, int] | None:
    """Where the right piece goes on for the left one: the number of a token in each. None if they disagree."""
    middle = (right.start + left.end) // 2
    bounds = [middle - CONTEXT // 2, middle + CONTEXT // 2]
    left_begin, left_end = np.searchsorted(left.places_T, bounds)
    right_begin, right_end = np.searchsorted(right.places_T, bounds)
    agreed = left_end - left_begin
    is_same = np.array_equal(left.ids_T[left_begin:left_end], right.ids_T[right_begin:right_end]) and np.array_equal(
        left.places_T[left_begin:left_end], right.places_T[right_begin:right_end]
    )
    if agreed < MIN_AGREED or not is_same or left_begin < left.first:
        return None
    return int(left_begin + agreed // 2), int(right_begin + agreed // 2)


def _as_one(left: Piece, right: Piece, further: Iterator[Piece], tokenizer: PreTrainedTokenizerBase) -> Piece | None:
    """Two pieces tokenised together; None if that changes what was taken of the left one before.

    As many further ones as double the text: a long run in which pieces disagree is not tokenised over and over.
    """
    text, end = left.text + right.text[left.end - right.start :], right.end
    while len(text) < 2 * len(left.text) and (piece := next(further, None)):
        text, end = text + piece.text[end - piece.start :], piece.end
    (whole,) = _tokenised([(left.start, text)], tokenizer)
    is_same = np.array_equal(whole.ids_T[: left.first], left.ids_T[: left.first])
    return replace(whole, first=left.first) if is_same else None


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]] | None:
    """What the tokenizer puts before and behind a text by itself; None if it is not told by a word."""
    around, own = tokenizer("word")["input_ids"], tokenizer("word", add_special_tokens=False)["input_ids"]
    for num_before in range(len(around) - len(own) + 1):
        if around[num_before : num_before + len(own)] == own:
            return around[:num_before], around[num_before + len(own) :]
    return None
