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
from heapr.report.sweep.published_results import Numbers, find
from heapr.report.sweep.results import JobResult, Jobs
from heapr.report.sweep.table_parts import Cell, Row, Table

TEX_COLUMNS = 6  # as many as fit into one of a page's two columns
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
    """Return the table in GitHub's Markdown: best values in bold, notes below."""
    num_labels = _num_labels(table)
    num_metrics = len(table.columns) - num_labels
    rule = ["---"] * num_labels + ["---:"] * num_metrics
    lines = [f"### {table.title}", "", _pipes(table.columns), _pipes(rule)]
    for row in table.rows:
        cells = [_markdown_cell(cell) for cell in (*row.labels, *row.cells)]
        lines.append(_pipes(cells))
    lines += ["", table.caption]
    for number, note in enumerate(table.notes, start=1):
        lines.append(f"\n<sup>{number}</sup> {_plain(note)}")
    return "\n".join(lines) + "\n"


def to_tex(table: Table) -> str:
    """Return a LaTeX table, which needs the packages booktabs and graphicx.

    A table of more than `TEX_COLUMNS` columns spans both columns of the page, and shrinks to fit.
    """
    num_labels = _num_labels(table)
    num_metrics = len(table.columns) - num_labels
    environment = "table*" if len(table.columns) > TEX_COLUMNS else "table"
    headers = [_tex_header(name) for name in table.columns]
    lines = [
        f"\\begin{{{environment}}}",
        r"\centering",
        r"\small",
        r"\setlength{\tabcolsep}{3pt}",
        f"\\caption{{{escape_tex(table.title)}}}",
        r"\medskip",
        TEX_FIT,
        f"\\begin{{tabular}}{{{'l' * num_labels}{'r' * num_metrics}}}",
        r"\toprule",
        _ampersands(headers),
        r"\midrule",
    ]
    for number, row in enumerate(table.rows):
        if row.starts_group and number > 0:
            lines.append(r"\midrule")
        cells = [_tex_cell(cell) for cell in (*row.labels, *row.cells)]
        lines.append(_ampersands(cells))
    lines += [r"\bottomrule", r"\end{tabular}}", "", r"\raggedright\footnotesize", escape_tex(table.caption)]
    for number, note in enumerate(table.notes, start=1):
        lines.append(f"\\par $^{{{number}}}$ {escape_tex(note)}")
    lines.append(f"\\end{{{environment}}}")
    return "\n".join(lines) + "\n"


def to_html(table: Table) -> str:
    """Return an HTML table with its caption and notes."""
    num_labels = _num_labels(table)
    headers = []
    for number, name in enumerate(table.columns):
        kind = " class=label" if number < num_labels else ""
        headers.append(f"<th{kind}>{html.escape(name)}</th>")
    notes = []
    for number, note in enumerate(table.notes, start=1):
        notes.append(f"<p><sup>{number}</sup> {html.escape(note)}</p>")
    head = "".join(headers)
    body = "\n".join(map(_html_row, table.rows))
    return (
        f"<h2>{html.escape(table.title)}</h2>\n"
        "<div class=scroll><table class=results>\n"
        f"<thead><tr>{head}</tr></thead>\n"
        f"<tbody>\n{body}\n</tbody></table></div>\n"
        f"<div class=notes><p>{html.escape(table.caption)}</p>{''.join(notes)}</div>\n"
    )


def to_csv(jobs: Jobs, published: Numbers) -> str:
    """Return one line per job: what identifies it, why it failed if it did, and all its metrics, unrounded.

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
    """Return text as LaTeX prints it.

    Letters that a plain document lacks lose their accents, or become question marks.
    """
    return "".join(map(_tex_letter, text))


def _num_labels(table: Table) -> int:
    return len(table.rows[0].labels) if table.rows else 0


def _markdown_cell(cell: Cell) -> str:
    text = cell.text.replace("|", "\\|")
    marks = "".join(f"<sup>{note}</sup>" for note in cell.notes)
    return f"**{text}**{marks}" if cell.is_best else text + marks


def _tex_cell(cell: Cell) -> str:
    text = escape_tex(cell.text)
    notes = ",".join(map(str, cell.notes))
    marks = f"$^{{{notes}}}$" if notes else ""
    return f"\\textbf{{{text}}}{marks}" if cell.is_best else text + marks


def _tex_letter(character: str) -> str:
    if character in TEX_LETTERS:
        return TEX_LETTERS[character]
    if character.isascii():
        return character
    without_accents = unicodedata.normalize("NFKD", character).encode("ascii", "ignore")
    return without_accents.decode() or "?"


def _html_row(row: Row) -> str:
    classes = []
    if row.starts_group:
        classes.append("group")
    if not row.is_ours:
        classes.append("beside")
    cells = [_html_cell(cell, "th") for cell in row.labels]
    cells += [_html_cell(cell, "td") for cell in row.cells]
    return f'<tr class="{" ".join(classes)}">{"".join(cells)}</tr>'


def _html_cell(cell: Cell, tag: str) -> str:
    text = html.escape(cell.text)
    if cell.is_best:
        text = f"<b>{text}</b>"
    marks = "".join(f"<sup>{note}</sup>" for note in cell.notes)
    return f"<{tag}>{text}{marks}</{tag}>"


def _csv_row(job: JobResult, published: Numbers) -> dict[str, object]:
    """Return what is known of a job, by column."""
    row: dict[str, object] = {
        "job": job.number,
        "status": "failed" if job.summary is None else "finished",
        "error": job.error or "",
        "overrides": " ".join(job.overrides),
    }
    factors = (*NAMES, METHOD)
    for name in factors:
        row[name] = factor(job, name)
    for group, measured in job.metrics.items():
        for name, number in measured.items():
            row[f"{group}/{name}"] = number
    for name, measure in PRUNING_COSTS.items():
        cost = measure(job)
        if cost is not None:
            row[f"cost/{name}"] = cost
    return row | _published_values(job, published)


def _published_values(job: JobResult, published: Numbers) -> dict[str, float]:
    """Return the published numbers beside a job's metrics and sizes, by column."""
    sizes = [f"size/{name}" for name in job.metrics.get("size", {})]
    names = [*job.metrics.get("pruned", {}), *sizes]
    values = {}
    for name in names:
        pruned = find(published, job, name)
        dense = find(published, job, name, dense=True)
        if pruned is not None:
            values[f"published/{name}"] = pruned.value
        if dense is not None:
            values[f"published_dense/{name}"] = dense.value
    return values


def _pipes(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _ampersands(cells: Sequence[str]) -> str:
    return " & ".join(cells) + r" \\"


def _tex_header(name: str) -> str:
    """Return a header, broken into several lines if it is long."""
    lines = [escape_tex(line) for line in textwrap.wrap(name, 13)]
    stacked = r"\\".join(lines)
    return stacked if len(lines) <= 1 else f"\\shortstack{{{stacked}}}"


def _plain(text: str) -> str:
    """Escape the letters that mean something in Markdown."""
    letters = [f"\\{letter}" if letter in "\\`*_[]<>|" else letter for letter in text]
    return "".join(letters)
