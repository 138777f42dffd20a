"""A multiple-choice task that needs no network: which of four continuations belongs to a docstring.

In: the held-out documents of `pydocs`. Out: a folder with a task in lm-eval's YAML and its items as JSON
lines. The same documents give the same items.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from heapr.text.corpora import PyDocs

NAME = "pydocs_continuation"
VERSION = 1  # increased when the same documents give other items
CONTEXT_WORDS = 24
# Short, because the likelihood of a long continuation depends more on how common its words are than on
# whether it fits.
CONTINUATION_WORDS = 4
MAX_PIECES = 8  # per document, so that no long document dominates
NUM_CHOICES = 4
NEIGHBOURS = 24  # distractors are drawn from this many continuations, those nearest in length


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        context: beginning of a piece of a docstring.
        choices: its continuation, and continuations of similar length from other documents.
        label: index of the right choice.
    """

    context: str
    choices: list[str]
    label: int


@dataclass(frozen=True)
class _Piece:
    document: int
    context: str
    continuation: str

    @property
    def digest(self) -> int:
        """A pseudorandom number that depends only on the text."""
        text = f"{self.context}\0{self.continuation}"
        digest = hashlib.sha256(text.encode()).digest()
        return int.from_bytes(digest[:8], "big")


def identity() -> dict[str, Any]:
    """What determines the items. `corpus` is the same key as for measurements that need a corpus."""
    return {"corpus": PyDocs("heldout").identity(), "items_version": VERSION}


def write_task(folder: Path) -> None:
    """Write the task for the docstrings of the running Python into an empty folder."""
    items = make_items(PyDocs("heldout").documents())
    lines = [json.dumps(asdict(item)) + "\n" for item in items]
    data = folder / f"{NAME}.jsonl"
    data.write_text("".join(lines))
    mean = {"aggregation": "mean", "higher_is_better": True}
    task = {
        "task": NAME,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc", **mean}, {"metric": "acc_norm", **mean}],
        "metadata": {"version": VERSION},
    }
    (folder / f"{NAME}.yaml").write_text(json.dumps(task, indent=2))  # JSON is YAML


def make_items(documents: Sequence[str]) -> list[Item]:
    """Turn every piece of every document into a question, in an order that depends only on the texts."""
    pieces: list[_Piece] = []
    for number, document in enumerate(documents):
        pieces += _pieces(number, document)
    by_length = sorted(pieces, key=lambda piece: (len(piece.continuation), piece.digest))
    reach = NEIGHBOURS // 2
    items = []
    for place, piece in enumerate(by_length):
        first = max(0, place - reach)
        item = _item(piece, by_length[first : place + reach + 1])
        if item is not None:
            items.append(item)
    return items


def _item(piece: _Piece, neighbours: Sequence[_Piece]) -> Item | None:
    """A question, or None if too few of the neighbours belong to other documents."""
    others = {other.continuation: other for other in neighbours if other.document != piece.document}
    others.pop(piece.continuation, None)
    num_distractors = NUM_CHOICES - 1
    if len(others) < num_distractors:
        return None
    shuffled = sorted(others.values(), key=lambda other: other.digest ^ piece.digest)
    label = piece.digest % NUM_CHOICES
    choices = [other.continuation for other in shuffled[:num_distractors]]
    choices.insert(label, piece.continuation)
    return Item(context=piece.context, choices=choices, label=label)


def _pieces(number: int, document: str) -> list[_Piece]:
    """The first pieces of a document in order, with the white space inside them."""
    words = list(re.finditer(r"\S+", document))
    length = CONTEXT_WORDS + CONTINUATION_WORDS
    starts = range(0, len(words) - length + 1, length)[:MAX_PIECES]
    pieces = []
    for start in starts:
        context = _text_of(document, words[start : start + CONTEXT_WORDS])
        continuation = _text_of(document, words[start + CONTEXT_WORDS : start + length])
        pieces.append(_Piece(number, context, continuation))
    return pieces


def _text_of(document: str, words: Sequence[re.Match[str]]) -> str:
    """The part of a document from the first to the last of some words."""
    return document[words[0].start() : words[-1].end()]
