"""The super experts of a sweep's models, as a section of the page.

In: jobs, whose plans' reports are read. Out: HTML, one row for each model.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

from heapr.artifacts import read_super_experts
from heapr.report.sweep.factors import factor, show
from heapr.report.sweep.results import Jobs, finished, stage_folder

HEADERS = ("model", "layer", "expert", "times the median", "in jobs", "protected")
NOTE = (
    "By their largest |p h w|, these experts are above the 99.5 % quantile of all experts and above a tenth"
    " of the largest. The largest always is one: how many times the median it is tells whether it matters"
    " (a range where calibrations differ). A streamed model's are looked for only if they are protected."
)
LEAST_WHOLE = 100  # multiples from here on have no decimals

Expert = tuple[int, int]  # decoder layer index, and index in the layer
Row = tuple[str, bool]  # the model, and whether its super experts are protected


def super_experts_section(jobs: Jobs) -> str:
    """Return a table of the models' super experts; nothing if no job's plan has any.

    Jobs that protect them and jobs that do not are apart, also of one model.
    """
    times: dict[Row, dict[Expert, list[float]]] = {}
    num_jobs: dict[Row, int] = {}
    for job in finished(jobs):
        folder = stage_folder(job, "prune")
        found = [] if folder is None else read_super_experts(folder)
        if not found:
            continue
        are_protected = bool(job.config["pruning"].get("protect_super_experts", False))
        row = (show("model", factor(job, "model")), are_protected)
        num_jobs[row] = num_jobs.get(row, 0) + 1
        of_row = times.setdefault(row, {})
        for each in found:
            of_row.setdefault((each["layer"], each["expert"]), []).append(each["times_median"])
    if not times:
        return ""
    headers = [f"<th>{header}</th>" for header in HEADERS]
    rows = [_row(row, of_row, num_jobs[row]) for row, of_row in times.items()]
    head = f"<thead><tr>{''.join(headers)}</tr></thead>"
    table = f"<div class=scroll><table class=plain>{head}<tbody>{''.join(rows)}</tbody></table></div>"
    return f"<h2>Super experts</h2>\n{table}\n<div class=notes><p>{NOTE}</p></div>\n"


def _row(row: Row, times: Mapping[Expert, Sequence[float]], num_jobs: int) -> str:
    """Return a model's row; every cell has a line for each expert, the largest first."""
    model, are_protected = row
    by_size = sorted(times.items(), key=lambda each: -max(each[1]))
    columns = (
        [str(layer) for (layer, _), _ in by_size],
        [str(expert) for (_, expert), _ in by_size],
        [_range_of(of_expert) for _, of_expert in by_size],
        [f"{len(of_expert)} of {num_jobs}" for _, of_expert in by_size],
    )
    cells = [f"<td>{'<br>'.join(lines)}</td>" for lines in columns]
    cells.append(f"<td>{'yes' if are_protected else 'no'}</td>")
    return f"<tr><th>{html.escape(model)}</th>{''.join(cells)}</tr>"


def _range_of(values: Sequence[float]) -> str:
    """Return the least and the largest value, or the one number if both read the same."""
    least, largest = _rounded(min(values)), _rounded(max(values))
    return largest if least == largest else f"{least} to {largest}"


def _rounded(value: float) -> str:
    return f"{value:,.0f}" if value >= LEAST_WHOLE else f"{value:.3g}"
