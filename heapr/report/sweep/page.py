"""The page of a report: one HTML file that needs nothing else, readable on light and dark screens.

In: tables, pictures, jobs. Out: HTML. Links to artifacts are relative to the report's folder.
"""

from __future__ import annotations

import html
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from heapr.report.sweep.calibrations import coverage_section
from heapr.report.sweep.factors import describe, differing, factor, failure, flat, header, show, what_differs
from heapr.report.sweep.facts import facts
from heapr.report.sweep.render import to_html
from heapr.report.sweep.report_layout import Entry, Layout
from heapr.report.sweep.results import Jobs, artifact_folder, finished
from heapr.report.sweep.super_expert_table import super_experts_section
from heapr.report.sweep.table_parts import Table

CSS = """
:root { color-scheme: light dark; --ink: #1d1d1f; --dim: #5c5f66; --paper: #ffffff; --line: #d5d7db; --shade: #f4f5f7; --link: #0b5cad;
  --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e7ea; --dim: #a3a7ae; --paper: #17181b; --line: #3b3e44; --shade: #212327;
  --link: #7db7f5; --bad: #ff8a80; } }
body { margin: 2rem auto; max-width: 72rem; padding: 0 1rem; font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); }
h1 { font-size: 1.6rem; margin: 0 0 .3rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
a { color: var(--link); } code, pre { font: 12.5px/1.45 ui-monospace, monospace; }
pre { background: var(--shade); padding: .6rem .8rem; overflow-x: auto; border-radius: 4px; white-space: pre-wrap; }
.dim, .notes { color: var(--dim); } .notes { font-size: 13px; } .notes p { margin: .25rem 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th, td { padding: .22rem .6rem; text-align: right; vertical-align: top; white-space: nowrap; font-weight: normal; }
thead th { font-weight: 600; white-space: normal; vertical-align: bottom; }
tbody th, thead .label, .plain th, .plain td { text-align: left; }
.results { border-top: 2px solid var(--ink); border-bottom: 2px solid var(--ink); } .results thead th { border-bottom: 1px solid var(--ink); }
.results tr.group > * { border-top: 1px solid var(--line); } .results tr.beside > * { color: var(--dim); }
.plain td, .plain th { border-bottom: 1px solid var(--line); white-space: normal; overflow-wrap: anywhere; }
.scroll .plain td, .scroll .plain th { white-space: nowrap; overflow-wrap: normal; }
figure { margin: 0 0 1.6rem; } figure svg { display: block; width: 100%; height: auto; } figure svg text { fill: var(--ink); }
figcaption { color: var(--dim); font-size: 13px; margin-top: .3rem; } figcaption b { color: var(--ink); font-weight: 600; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem .9rem; margin: 0 0 .8rem; font-size: 13.5px; } dt { color: var(--dim); } dd { margin: 0; }
.failed { color: var(--bad); } details { margin: .5rem 0; } summary { cursor: pointer; }
"""

PAGE_COLOURS = {"#ffffff": "paper", "#000000": "ink", "#e3e3e3": "line"}  # from an SVG's to the page's


@dataclass(frozen=True)
class Picture:
    """A figure of an entry.

    Attributes:
        entry: of the layout.
        about: the model or job that is drawn.
        files: the SVG, then the PNG; empty if there was nothing to draw.
        missing: what could not be drawn, and why.
        caption: what the figure shows and how to read it.
    """

    entry: Entry
    about: str
    files: tuple[Path, ...]
    missing: str
    caption: str = ""


def page(layout: Layout, jobs: Jobs, parts: Sequence[Table | Picture], folder: Path) -> str:
    """Return the whole page as HTML.

    Args:
        layout: title, command and date.
        jobs: of the sweep.
        parts: tables and pictures in their order.
        folder: of the page; links to artifacts are relative to it.
    """
    title = html.escape(layout.title)
    sections = [
        _head(layout, jobs),
        *_parts(parts),
        _failures(jobs),
        coverage_section(jobs),
        super_experts_section(jobs),
        _differences(jobs),
        _stages(jobs, folder),
        _common(jobs),
    ]
    body = "".join(sections)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width">\n'
        f"<title>{title}</title>\n<style>{CSS}</style>\n</head>\n"
        f"<body>\n<h1>{title}</h1>\n{body}</body>\n</html>\n"
    )


def without_local_links(text: str) -> str:
    """Return the page without links to jobs and artifacts, for a copy that is kept without them."""
    return re.sub(r"<a class=local [^>]*>(.*?)</a>", r"\1", text)


def inline_svg(text: str) -> str:
    """Return an SVG file's root element for use inside HTML: without prologue, namespaces and size.

    Paper, ink and grid lines have the colours of the page, which are others on a dark screen.
    """
    root = text[text.index("<svg") :]
    opening, rest = root.split(">", 1)
    opening = re.sub(r'\s(?:xmlns(?::\w+)?|width|height|version)="[^"]*"', "", opening)
    for colour, variable in PAGE_COLOURS.items():
        rest = rest.replace(colour, f"var(--{variable})")
    return f"{opening}>{rest}".strip()


def _head(layout: Layout, jobs: Jobs) -> str:
    done = len(finished(jobs))
    text = f"{done} of {len(jobs)} jobs finished"
    if done < len(jobs):
        text += f", {len(jobs) - done} failed"
    if layout.date:
        text += f" · {layout.date}"
    head = f"<p class=dim>{html.escape(text)}</p>\n"
    lines = [f"<dt>{name}</dt><dd>{html.escape(line)}</dd>" for name, line in facts(jobs).items()]
    head += f"<dl>{''.join(lines)}</dl>\n"
    if layout.command:
        head += f"<pre>{html.escape(layout.command)}</pre>\n"
    return head


def _parts(parts: Sequence[Table | Picture]) -> list[str]:
    """Return the tables, and the pictures of each entry under its title."""
    texts: list[str] = []
    current: Entry | None = None
    for part in parts:
        if isinstance(part, Table):
            texts.append(to_html(part))
            continue
        if part.entry is not current:
            texts.append(f"<h2>{html.escape(part.entry.title)}</h2>\n")
        texts.append(_figure(part))
        current = part.entry
    return texts


def _figure(picture: Picture) -> str:
    """Return a drawing with what it shows, what is missing in it, and links to its files, the SVG first."""
    drawing = ""
    if picture.files:
        svg, *_ = picture.files
        drawing = inline_svg(svg.read_text(encoding="utf-8"))
    about = f"<b>{html.escape(picture.about)}.</b>" if picture.about else ""
    words = html.escape(" ".join(filter(None, (picture.caption, picture.missing))))
    links = map(_link_to_file, picture.files)
    caption = " ".join(filter(None, (about, words, *links)))
    return f"<figure>\n{drawing}\n<figcaption>{caption}</figcaption>\n</figure>\n"


def _link_to_file(path: Path) -> str:
    kind = path.suffix.removeprefix(".").upper()
    return f'<a href="{quote(path.name)}">{kind}</a>'


def _failures(jobs: Jobs) -> str:
    failed = [job for job in jobs if job.summary is None]
    if not failed:
        return ""
    items = [f"<li>{html.escape(failure(job))}</li>" for job in failed]
    return f"<h2>Failed jobs</h2>\n<ul class=failed>{''.join(items)}</ul>\n"


def _differences(jobs: Jobs) -> str:
    """List what differs between jobs, one row per job."""
    names = what_differs(jobs)
    if not names:
        return ""
    headers = [f"<th>{html.escape(name)}</th>" for name in ("job", *map(header, names))]
    rows = []
    for job in jobs:
        values = [show(name, factor(job, name)) for name in names]
        cells = [f"<td>{html.escape(value)}</td>" for value in values]
        rows.append(f"<tr><th>{job.number}</th>{''.join(cells)}</tr>")
    return f"<h2>What differs between jobs</h2>\n{_scrolling_table(''.join(headers), rows)}\n"


def _scrolling_table(headers: str, rows: Sequence[str]) -> str:
    head = f"<thead><tr>{headers}</tr></thead>"
    return f"<div class=scroll><table class=plain>{head}<tbody>{''.join(rows)}</tbody></table></div>"


def _stages(jobs: Jobs, folder: Path) -> str:
    """List every job's artifacts, folded."""
    headers = "<th>stage</th><th>artifact</th><th>seconds</th>"
    texts = ["<h2>Jobs and their artifacts</h2>\n"]
    names = what_differs(jobs)
    for job in jobs:
        label = f"Job {job.number}"
        if job.folder is not None:
            label = f'<a class=local href="{_link(job.folder, folder)}">{label}</a>'
        name = html.escape(describe(job, names) if names else " ".join(job.overrides))
        if job.summary is None:
            texts.append(f"<p>{label}: {name} <span class=failed>failed</span></p>\n")
            continue
        rows = []
        for stage in job.summary["stages"]:
            link = _link(artifact_folder(job, stage), folder)
            rows.append(_stage_row(stage, link))
        table = _scrolling_table(headers, rows)
        texts.append(f"<details><summary>{label}: {name}</summary>\n{table}</details>\n")
    return "".join(texts)


def _stage_row(stage: Mapping[str, Any], link: str) -> str:
    """Return a row of a job's stages; its artifact is a link."""
    what = f"{stage['stage']} {stage.get('what', '')}".strip()
    key = html.escape(stage["key"])
    artifact = f'<a class=local href="{link}">{key}</a>'
    seconds = "cached" if stage["cached"] else f"{stage['seconds']:.1f}"
    return f"<tr><td>{html.escape(what)}</td><td>{artifact}</td><td>{seconds}</td></tr>"


def _common(jobs: Jobs) -> str:
    """List the configuration that all jobs share, folded."""
    configs = [flat(job.config) for job in jobs if job.config]
    if not configs:
        return ""
    apart = set(differing(jobs))
    rows = []
    for path, value in configs[0].items():
        if path not in apart:
            name = html.escape(path)
            text = html.escape(str(value))
            rows.append(f"<tr><td>{name}</td><td>{text}</td></tr>")
    table = f"<table class=plain><tbody>{''.join(rows)}</tbody></table>"
    return f"<h2>Configuration</h2>\n<details><summary>What all jobs have in common</summary>\n{table}</details>\n"


def _link(path: Path, folder: Path) -> str:
    return quote(Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix())
