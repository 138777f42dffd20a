"""Tables as Markdown, LaTeX, HTML and CSV.

In: finished tables, or jobs for the CSV. Out: text.
"""

from __future__ import annotations

import csv
import html
import io
import textwrap
import unicodedata
from collections.abc import Sequence

from heapr.report.sweep.factors import METHOD, NAMES, factor
from heapr.report.sweep.metrics import PRUNING_COSTS
from heapr.report.sweep.published_results import Number, find
from heapr.report.sweep.results import JobResult
from heapr.report.sweep.table import Cell, Row, Table

TEX_COLUMNS = 6  # as many have room in one of a page's two columns
TEX_FIT = r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%"
TEX_LETTERS = {
    "\\": r"\textbackslash{}",
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
    "[": "{[}",  # after a line break it would begin a length
    "]": "{]}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "±": r"$\pm$",
    "−": "$-$",
    "—": "---",
    "↓": r"$\downarrow$",
    "↑": r"$\uparrow$",
    "’": "'",
    "×": r"$\times$",
    "†": r"$^{\dagger}$",
}


def to_markdown(table: Table) -> str:
    """GitHub's Markdown: notes below, best in bold."""

    def cell(value: Cell) -> str:
        text = value.text.replace("|", "\\|")
        marks = "".join(f"<sup>{note}</sup>" for note in value.notes)
        return f"**{text}**{marks}" if value.is_best else text + marks

    num_labels = len(table.rows[0].labels) if table.rows else 0
    rule = ["---" if number < num_labels else "---:" for number in range(len(table.columns))]
    lines = [f"### {table.title}", "", _pipes(table.columns), _pipes(rule)]
    lines += [_pipes([cell(value) for value in (*row.labels, *row.cells)]) for row in table.rows]
    lines += ["", table.caption]
    lines += [f"\n<sup>{number}</sup> {_plain(note)}" for number, note in enumerate(table.notes, start=1)]
    return "\n".join(lines) + "\n"


def to_tex(table: Table) -> str:
    """A LaTeX table that needs the packages booktabs and graphicx. A wide one spans both columns, and shrinks
    to the page if it must."""

    def cell(value: Cell) -> str:
        text = escape_tex(value.text)
        marks = f"$^{{{','.join(map(str, value.notes))}}}$" if value.notes else ""
        return f"\\textbf{{{text}}}{marks}" if value.is_best else text + marks

    num_labels = len(table.rows[0].labels) if table.rows else 0
    environment = "table*" if len(table.columns) > TEX_COLUMNS else "table"
    lines = [f"\\begin{{{environment}}}", r"\centering", r"\small", r"\setlength{\tabcolsep}{3pt}"]
    lines += [f"\\caption{{{escape_tex(table.title)}}}", r"\medskip", TEX_FIT]
    lines += [
        f"\\begin{{tabular}}{{{'l' * num_labels}{'r' * (len(table.columns) - num_labels)}}}",
        r"\toprule",
    ]
    lines += [_ampersands([_tex_header(name) for name in table.columns]), r"\midrule"]
    for number, row in enumerate(table.rows):
        if row.starts_group and number > 0:
            lines.append(r"\midrule")
        lines.append(_ampersands([cell(value) for value in (*row.labels, *row.cells)]))
    lines += [r"\bottomrule", r"\end{tabular}}", "", r"\raggedright\footnotesize", escape_tex(table.caption)]
    lines += [f"\\par $^{{{number}}}$ {escape_tex(note)}" for number, note in enumerate(table.notes, start=1)]
    return "\n".join([*lines, f"\\end{{{environment}}}"]) + "\n"


def to_html(table: Table) -> str:
    """An HTML table with caption and notes."""

    def cell(value: Cell, tag: str) -> str:
        text = html.escape(value.text)
        marks = "".join(f"<sup>{note}</sup>" for note in value.notes)
        return f"<{tag}>{f'<b>{text}</b>' if value.is_best else text}{marks}</{tag}>"

    def line(row: Row) -> str:
        names = [name for name, holds in (("group", row.starts_group), ("beside", not row.is_ours)) if holds]
        cells = [cell(value, "th") for value in row.labels] + [cell(value, "td") for value in row.cells]
        return f'<tr class="{" ".join(names)}">{"".join(cells)}</tr>'

    num_labels = len(table.rows[0].labels) if table.rows else 0
    kinds = [" class=label" if number < num_labels else "" for number in range(len(table.columns))]
    head = "".join(
        f"<th{kind}>{html.escape(name)}</th>" for kind, name in zip(kinds, table.columns, strict=True)
    )
    notes = "".join(
        f"<p><sup>{number}</sup> {html.escape(note)}</p>" for number, note in enumerate(table.notes, start=1)
    )
    body = "\n".join(line(row) for row in table.rows)
    return (
        f"<h2>{html.escape(table.title)}</h2>\n<div class=scroll><table"
        f" class=results>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>\n<div"
        f" class=notes><p>{html.escape(table.caption)}</p>{notes}</div>\n"
    )


def to_csv(jobs: Sequence[JobResult], published: Sequence[Number]) -> str:
    """One line per job: what identifies it, why it failed if it did, and all metrics as they were measured,
    unrounded.

    Published numbers follow under `published/<metric>` and `published_dense/<metric>`, in the same units.
    """
    rows = [_csv_row(job, published) for job in jobs]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    columns.sort(key=lambda name: name.startswith("published"))
    file = io.StringIO()
    writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def escape_tex(text: str) -> str:
    """Text as LaTeX prints it; letters that a plain document lacks lose their accents or become question
    marks."""

    def letter(character: str) -> str:
        if character in TEX_LETTERS or character.isascii():
            return TEX_LETTERS.get(character, character)
        return unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode() or "?"

    return "".join(map(letter, text))


def _csv_row(job: JobResult, published: Sequence[Number]) -> dict[str, object]:
    row: dict[str, object] = {
        "job": job.number,
        "status": "failed" if job.summary is None else "finished",
        "error": job.error or "",
    }
    row |= {"overrides": " ".join(job.overrides)} | {name: factor(job, name) for name in (*NAMES, METHOD)}
    row |= {
        f"{group}/{name}": number for group, found in job.metrics.items() for name, number in found.items()
    }
    row |= {f"cost/{name}": found for name, cost in PRUNING_COSTS.items() if (found := cost(job)) is not None}
    for name in [*job.metrics.get("pruned", {}), *(f"size/{size}" for size in job.metrics.get("size", {}))]:
        for column, dense in (("published", False), ("published_dense", True)):
            number = find(published, job, name, dense=dense)
            if number is not None:
                row[f"{column}/{name}"] = number.value
    return row


def _pipes(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _ampersands(cells: Sequence[str]) -> str:
    return " & ".join(cells) + r" \\"


def _tex_header(name: str) -> str:
    """A long header on several lines."""
    lines = [escape_tex(line) for line in textwrap.wrap(name, 13)]
    stacked = r"\\".join(lines)
    return stacked if len(lines) <= 1 else f"\\shortstack{{{stacked}}}"


def _plain(text: str) -> str:
    """Text whose letters mean nothing in Markdown."""
    return "".join(f"\\{letter}" if letter in "\\`*_[]<>|" else letter for letter in text)
