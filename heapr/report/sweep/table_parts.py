"""What a finished table consists of.

In: text. Out: a `Table`, which `heapr.report.sweep.render` writes.
"""

from __future__ import annotations

from dataclasses import dataclass

GAP = "—"  # the text of a cell without a number
NOT_MEASURED = "not measured"  # a remark, and the text of a cell whose only remark it is

Marks = tuple[int, ...]  # numbers of footnotes


@dataclass(frozen=True)
class Cell:
    """Text, the numbers of its notes, and whether it is the best of its group."""

    text: str = ""
    notes: Marks = ()
    is_best: bool = False


Cells = tuple[Cell, ...]


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        labels: cells before the metrics.
        cells: one per metric.
        is_ours: whether its numbers were measured here.
        starts_group: whether to draw a rule above it.
    """

    labels: Cells
    cells: Cells
    is_ours: bool
    starts_group: bool = False


@dataclass(frozen=True)
class Table:
    """A finished table.

    Attributes:
        title: above it.
        caption: what holds for all rows, and how to read it.
        columns: headers of the labels, then of the metrics.
        rows: in order.
        notes: numbered from 1.
    """

    title: str
    caption: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]


class Notes:
    """Footnotes, each text once, numbered in order of appearance."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def number(self, text: str) -> int:
        if text not in self.texts:
            self.texts.append(text)
        return self.texts.index(text) + 1
