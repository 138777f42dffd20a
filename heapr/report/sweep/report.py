"""A sweep's report: tables, figures and one page, from summaries and artifacts only.

In: jobs and a layout. Out: table.md, table.csv, table.tex, figures as SVG and PNG, report.html.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from heapr.errors import ConfigError
from heapr.files import write_text
from heapr.report.run.protocol import compare_models, compare_summaries
from heapr.report.sweep.bars import bars
from heapr.report.sweep.consistency import consistency
from heapr.report.sweep.curves import Drawing, calibration_curve, ratio_curve
from heapr.report.sweep.factors import factor, selected
from heapr.report.sweep.layers import layer_heatmap
from heapr.report.sweep.page import Picture, page
from heapr.report.sweep.published_results import Numbers, read_published
from heapr.report.sweep.relative import LEAST_SPAN, relative_curve, relative_table
from heapr.report.sweep.render import to_csv, to_markdown, to_tex
from heapr.report.sweep.report_layout import TITLES, Entry, default_entries, read_layout
from heapr.report.sweep.results import Jobs, finished
from heapr.report.sweep.scales import one_scale
from heapr.report.sweep.shares import for_csv
from heapr.report.sweep.style import name_scales, style, write_figure
from heapr.report.sweep.table import build_table
from heapr.report.sweep.table_parts import Table

FIGURES: Mapping[str, Callable[[Entry, Jobs, Numbers], list[Drawing]]] = {
    "ratio_curve": ratio_curve,
    "calibration_curve": calibration_curve,
    "bars": bars,
    "layer_heatmap": layer_heatmap,
    "consistency": consistency,
    "relative_curve": relative_curve,
}
TABLES: Mapping[str, Callable[[Entry, Jobs, Numbers], Table]] = {
    "table": build_table,
    "relative_table": relative_table,
}
CAPTIONS = {
    "ratio_curve": "Lines start at the unpruned model (0 %), whose numbers are the dashed lines, and have a"
    " point for each ratio, at the share that was really removed. FLOPs saved are of the whole model;"
    " experts' FLOPs saved, of the routed experts alone.",
    "calibration_curve": "Means over jobs that are averaged, with their standard deviations; the dashed line"
    " is the unpruned model.",
    "bars": "The number of each bar stands beside it; the dashed line is the unpruned model.",
    "layer_heatmap": "Left, the share removed of every expert; right, of every layer.",
    "consistency": "A point for each score quantile, removed alone: the increase of the loss that its scores"
    " predict, and the one that was measured.",
    "relative_curve": "How far a metric is from the unpruned model's, divided by how far it is with the"
    " baseline (dashed); lower is better. All panels have one scale, that of the points; error bars may leave"
    " it.",
}
TEX_HEAD = "% Needs \\usepackage{booktabs,graphicx}; include with \\input.\n"


def write_report(jobs: Jobs, layout: Mapping[str, Any], folder: Path, published: Path | None) -> list[Path]:
    """Write all files of a report.

    Args:
        jobs: of the sweep, including failed ones, which become gaps.
        layout: the `report` section of an experiment, see `heapr.report.sweep.report_layout`; empty for the
            default.
        folder: gets the files.
        published: folder of results.csv; None for a report without published numbers.

    Returns:
        The files, in the order in which they were written.

    Raises:
        ConfigError: there are no jobs, the layout is invalid, or results were measured in different ways.
    """
    if not jobs:
        raise ConfigError(f"nothing to report in '{folder}': the sweep has no jobs")
    checked = read_layout(layout)
    numbers = read_published(published)
    check_protocols(jobs)
    folder.mkdir(parents=True, exist_ok=True)
    entries = checked.entries or default_entries(jobs)
    tables = [TABLES[entry.kind](entry, jobs, numbers) for entry in entries if entry.kind in TABLES]
    with_shares = for_csv(entries, jobs)
    files = _write_tables(folder, tables, checked.title, csv=to_csv(with_shares, numbers))
    with_figures = [entry for entry in entries if entry.kind in FIGURES]
    pictures = _pictures(with_figures, jobs, numbers, folder)
    files += [path for picture in pictures for path in picture.files]
    ordered = _in_order(entries, tables, pictures)
    whole_page = page(checked, jobs, ordered, folder)
    files.append(_write(folder / "report.html", whole_page))
    return files


def check_protocols(jobs: Jobs) -> None:
    """Refuse results that cannot share a table.

    Raises:
        ConfigError: results of one model were measured in different ways, or those of different models in
            ways that differ in more than what their tokenizers decide.
    """
    done = finished(jobs)
    summaries = {f"job {job.number}": job.summary for job in done if job.summary is not None}
    differences = compare_models(summaries)
    models = dict.fromkeys(factor(job, "model") for job in done)
    for model in models:
        members = [f"job {job.number}" for job in done if factor(job, "model") == model]
        of_model = {name: summaries[name] for name in members}
        differences += compare_summaries(of_model)
    if differences:
        raise ConfigError(
            f"these results cannot stand in one table: {differences[0]}; report them in sweeps of their own"
        )


def _write_tables(folder: Path, tables: Sequence[Table], title: str, *, csv: str) -> list[Path]:
    """Write the files that hold tables alone; a table without a title of its own gets the report's."""
    titled = [_titled(table, title) for table in tables]
    texts = {
        "table.md": "\n".join(map(to_markdown, titled)),
        "table.csv": csv,
        "table.tex": TEX_HEAD + "\n".join(map(to_tex, titled)),
    }
    return [_write(folder / name, text) for name, text in texts.items()]


def _titled(table: Table, title: str) -> Table:
    """Return the table, with the report's title if it has none of its own."""
    is_untitled = table.title == TITLES["table"]
    return replace(table, title=title) if is_untitled else table


def _pictures(entries: Sequence[Entry], jobs: Jobs, numbers: Numbers, folder: Path) -> list[Picture]:
    """Draw and write the figures of all entries.

    An entry without any gets a picture that says so. Shares have one scale in all figures. Files are numbered
    from the second figure of a kind on.
    """
    pictures: list[Picture] = []
    with style():
        drawn = [(entry, FIGURES[entry.kind](entry, _candidates(entry, jobs), numbers)) for entry in entries]
        all_shares = [panel for _, drawings in drawn for drawing in drawings for panel in drawing.shares]
        if all_shares:
            one_scale(all_shares, LEAST_SPAN)
        used: Counter[str] = Counter()
        for entry, drawings in drawn:
            failures = _missing(selected(jobs, entry.where))
            for drawing in drawings:
                used[entry.kind] += 1
                stem = entry.kind if used[entry.kind] == 1 else f"{entry.kind}_{used[entry.kind]}"
                name_scales(drawing.figure)
                files = write_figure(drawing.figure, folder / stem)
                missing = " ".join(filter(None, (failures, drawing.missing)))
                caption = " ".join(filter(None, (CAPTIONS[entry.kind], drawing.caption)))
                pictures.append(Picture(entry, drawing.about, tuple(files), missing, caption))
            if not drawings:
                nothing = f"Nothing to draw: no job has its numbers. {failures}"
                pictures.append(Picture(entry, "", (), nothing))
    return pictures


def _candidates(entry: Entry, jobs: Jobs) -> Jobs:
    """Return the jobs that an entry may draw: a baseline may be a job that `where` does not select."""
    return jobs if entry.baseline else selected(jobs, entry.where)


def _missing(jobs: Jobs) -> str:
    missing = [str(job.number) for job in jobs if job.summary is None]
    return f"Not drawn, because they failed: jobs {', '.join(missing)}." if missing else ""


def _in_order(
    entries: Sequence[Entry], tables: Sequence[Table], pictures: Sequence[Picture]
) -> list[Table | Picture]:
    """Return tables and pictures in the order of the layout."""
    waiting = list(tables)
    ordered: list[Table | Picture] = []
    for entry in entries:
        if entry.kind in TABLES:
            ordered.append(waiting.pop(0))
        else:
            ordered += [picture for picture in pictures if picture.entry is entry]
    return ordered


def _write(path: Path, text: str) -> Path:
    write_text(path, text)
    return path
