"""How much of a baseline's damage is left: a metric's increase over the dense model's, as a share of the baseline's increase.

In: an entry of the layout and the jobs of a sweep. Out: a table, drawings, and the jobs with shares among their numbers.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from heapr.errors import ConfigError
from heapr.report import metrics
from heapr.report.curves import Drawing, Series, by_model, limits, logarithmic, ratio_axis, series_of
from heapr.report.factors import RESULTLESS, factor, flat, header, paths_of, selected, show
from heapr.report.layout import Entry
from heapr.report.published import Number
from heapr.report.results import JobResult, finished
from heapr.report.style import DENSE_LINE, legend_above, look, panels
from heapr.report.table import Table, build_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHARE = "relative"  # before a metric's name
TICKS = (0.0, 0.5, 1.0, *(digit * 10.0**power for power in range(6) for digit in (2, 5, 10)))  # where zero and large numbers share an axis
WITHOUT_INFLUENCE = {"pruning.save_checkpoint", "calibration.batch_size"}


def relative_table(entry: Entry, jobs: Sequence[JobResult], published: Sequence[Number]) -> Table:
    """Rows as those of any table; what has no baseline is a gap with a note."""
    shared, remarks = with_shares(entry, jobs)
    names = tuple(map(share_name, entry.metrics))
    return build_table(replace(entry, metrics=names), shared, (), remarks)


def relative_curve(entry: Entry, jobs: Sequence[JobResult], published: Sequence[Number]) -> list[Drawing]:
    """Shares against the ratio, a panel per metric, one figure per model; the baseline itself is the line at 1."""
    shared, remarks = with_shares(entry, jobs)
    chosen = selected(shared, entry.where)
    baselines = {job.number for job in selected(chosen, entry.baseline)}
    drawings = []
    for model, of_model in by_model([job for job in chosen if job.number not in baselines]):
        figure, axes = panels(len(entry.metrics), height=1.75, sharex=True)
        all_series = list(enumerate(series_of(of_model, entry, x="ratio")))
        all_series.sort(key=lambda found: _height(found[1], share_name(entry.metrics[0])), reverse=True)  # as the legend lists them
        for axis, name in zip(axes, entry.metrics, strict=True):
            for number, series in all_series:
                _line(axis, series, share_name(name), number)
            _finish(axis, name, entry.baseline)
        ratio_axis(axes[-1], of_model)
        legend_above(figure, axes)
        without = [str(job.number) for job in of_model if job.number in remarks]
        missing = f"Not drawn, for want of a baseline or of a number: jobs {', '.join(without)}." if without else ""
        drawings.append(Drawing(figure, model, missing))
    return drawings


def share_name(metric: str) -> str:
    """The name that a metric's share has in `with_shares`; of what is no comparison with the dense model, its own."""
    return f"{SHARE}/{metric}" if metric.partition("/")[0] in metrics.COMPARED else metric


def with_shares(entry: Entry, jobs: Sequence[JobResult], prefix: str = SHARE) -> tuple[list[JobResult], dict[int, str]]:
    """All jobs, those that have a baseline with shares of the entry's metrics in their comparison; and why others have none, by number.

    Raises:
        ConfigError: a job has two baselines, which differ.
    """
    baselines: dict[str, JobResult] = {}
    for job in finished(selected(jobs, entry.baseline)):
        _check_same(baselines.setdefault(_conditions(job, entry.baseline), job), job, entry.baseline)
    found = list(jobs)
    remarks: dict[int, str] = {}
    for place, job in enumerate(jobs):
        baseline = baselines.get(_conditions(job, entry.baseline))
        if baseline is not None and job.summary is not None:
            shares = {name: metrics.share_of_increase(job, baseline, name) for name in entry.metrics if share_name(name) != name}
            found[place] = _with_comparison(job, {f"{prefix}/{name}": share for name, share in shares.items() if share is not None})
            if lacking := [metrics.label(name) for name, share in shares.items() if share is None]:
                remarks[job.number] = f"Not measured, or no worse than unpruned with {_described(entry.baseline)}: {', '.join(lacking)}."
        elif job.summary is not None:
            remarks[job.number] = f"No finished job with {_described(entry.baseline)} and all else equal."
    return found, remarks


def for_csv(entries: Sequence[Entry], jobs: Sequence[JobResult]) -> list[JobResult]:
    """The jobs with the shares of all entries, under names that tell the baseline."""
    found = list(jobs)
    for entry in entries:
        if entry.baseline:
            found, _ = with_shares(entry, found, prefix=f"{SHARE} to {_described(entry.baseline)}")
    return found


def _conditions(job: JobResult, baseline: Mapping[str, Any]) -> str:
    """All of a job's configuration that changes its result and that the baseline does not name."""
    named = tuple(path for name in baseline for path in paths_of(name))
    return json.dumps({path: value for path, value in _settings(job).items() if not any(_is_in(path, name) for name in named)})


def _settings(job: JobResult) -> dict[str, Any]:
    """Of the configuration, what changes a result."""
    fields = flat(job.config)
    return {path: fields[path] for path in sorted(fields) if path.partition(".")[0] not in RESULTLESS and path not in WITHOUT_INFLUENCE}


def _is_in(path: str, name: str) -> bool:
    return path == name or path.startswith(f"{name}.")


def _check_same(first: JobResult, second: JobResult, baseline: Mapping[str, Any]) -> None:
    settings = [_settings(job) for job in (first, second)]
    for path in dict.fromkeys([*settings[0], *settings[1]]):
        if settings[0].get(path) != settings[1].get(path):
            raise ConfigError(
                f"jobs {first.number} and {second.number} could both be the baseline ({_described(baseline)}), but differ in {path}; "
                "add it to the baseline"
            )


def _with_comparison(job: JobResult, shares: Mapping[str, float]) -> JobResult:
    changed = {**job.metrics, "comparison": {**job.metrics["comparison"], **shares}}
    return replace(job, summary={**(job.summary or {}), "metrics": changed})


def _described(baseline: Mapping[str, Any]) -> str:
    return ", ".join(f"{header(name)} {show(name, value)}" for name, value in baseline.items())


def _height(series: Series, metric: str) -> float:
    """Mean of a line."""
    return statistics.fmean([mean for _, mean, _ in series.values(metric)] or [0.0])


def _line(axis: Axes, series: Series, metric: str, number: int) -> None:
    found = series.values(metric)
    xs = [100 * factor(series.points[point][0], "ratio") for point, _, _ in found]
    errors = [deviation for _, _, deviation in found]
    means = [mean for _, mean, _ in found]
    axis.errorbar(xs, means, yerr=errors if any(errors) else None, capsize=2, label=series.label, **look(number))


def _finish(axis: Axes, metric: str, baseline: Mapping[str, Any]) -> None:
    """The baseline's line, the label, and a logarithmic scale where shares span more than a factor of 8."""
    from matplotlib.ticker import FuncFormatter

    if share_name(metric) == metric:
        axis.set_ylabel(metrics.axis_label(metric))
        return
    name = " ".join(show(name, value) for name, value in baseline.items())
    axis.axhline(1.0, label=f"{name} (baseline)", zorder=1.5, **DENSE_LINE)
    axis.set_ylabel(metrics.label(share_name(metric)).replace(", ", ",\n"))
    lowest, highest = limits(axis)
    if lowest > 0 and highest / lowest > 8:
        logarithmic(axis, highest / lowest, which="y")
    elif highest > 8:
        axis.set_yscale("symlog", linthresh=1.0)  # shares of zero and below: better than the unpruned model
        axis.set_ylim(lowest - 0.1, 1.4 * highest)
        axis.set_yticks([tick for tick in TICKS if tick <= highest])
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    else:
        axis.set_ylim(bottom=min(0.0, axis.get_ylim()[0]))
