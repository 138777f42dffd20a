"""A multiple-choice task that needs no network: which of four continuations is the docstring's own.

In: the held-out documents of `pydocs`. Out: a folder with a task in lm-eval's YAML and its items as JSON
lines. Equal documents give equal items.
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
VERSION = 1  # raised when the same documents give other items
# Of a long continuation, how common its words are says more than whether it fits.
CONTEXT_WORDS, CONTINUATION_WORDS = (
    24,
    4,
)
MAX_PIECES = 8  # of one document, so that no long one dominates
NUM_CHOICES = 4
NEIGHBOURS = 24  # distractors come from this many continuations, those nearest in length


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        context: beginning of a piece of a docstring.
        choices: its continuation and those of other documents, of similar length.
        label: index of its own.
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
        """A number that looks random and depends on the text alone."""
        return int.from_bytes(
            hashlib.sha256(f"{self.context}\0{self.continuation}".encode()).digest()[:8], "big"
        )


def identity() -> dict[str, Any]:
    """What determines the items; `corpus` as for a measurement that needs one."""
    return {"corpus": PyDocs("heldout").identity(), "items_version": VERSION}


def write_task(folder: Path) -> None:
    """Write the task of the running Python's docstrings into an empty folder."""
    data = folder / f"{NAME}.jsonl"
    data.write_text(
        "".join(json.dumps(asdict(item)) + "\n" for item in make_items(PyDocs("heldout").documents()))
    )
    task = {
        "task": NAME,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "label",
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True}
            for metric in ("acc", "acc_norm")
        ],
        "metadata": {"version": VERSION},
    }
    (folder / f"{NAME}.yaml").write_text(json.dumps(task, indent=2))  # JSON is YAML


def make_items(documents: Sequence[str]) -> list[Item]:
    """Every piece of every document as a question, in an order that depends on the texts alone."""
    pieces = [piece for number, document in enumerate(documents) for piece in _pieces(number, document)]
    by_length = sorted(pieces, key=lambda piece: (len(piece.continuation), piece.digest))
    reach = NEIGHBOURS // 2
    found = (
        _item(piece, by_length[max(0, place - reach) : place + reach + 1])
        for place, piece in enumerate(by_length)
    )
    return [item for item in found if item is not None]


def _item(piece: _Piece, neighbours: Sequence[_Piece]) -> Item | None:
    """A question, or none if too few of the neighbours belong to other documents."""
    others = {other.continuation: other for other in neighbours if other.document != piece.document}
    others.pop(piece.continuation, None)
    chosen = sorted(others.values(), key=lambda other: other.digest ^ piece.digest)[: NUM_CHOICES - 1]
    if len(chosen) < NUM_CHOICES - 1:
        return None
    label = piece.digest % NUM_CHOICES
    choices = [other.continuation for other in chosen]
    choices.insert(label, piece.continuation)
    return Item(context=piece.context, choices=choices, label=label)


def _pieces(number: int, document: str) -> list[_Piece]:
    """The first pieces of a document, one after the other, white space inside kept."""
    words = list(re.finditer(r"\S+", document))
    length = CONTEXT_WORDS + CONTINUATION_WORDS
    starts = range(0, len(words) - length + 1, length)[:MAX_PIECES]
    pieces = []
    for start in starts:
        middle, end = start + CONTEXT_WORDS, start + length
        context = document[words[start].start() : words[middle - 1].end()]
        pieces.append(_Piece(number, context, document[words[middle].start() : words[end - 1].end()]))
    return pieces
