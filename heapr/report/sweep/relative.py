"""A metric's increase over the dense model's, as a share of a baseline's increase.

In: an entry of the layout and the jobs of a sweep. Out: a table, drawings, and the jobs with shares among
their numbers.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from heapr.errors import ConfigError
from heapr.report.sweep import metrics
from heapr.report.sweep.curves import Drawing, draw_line
from heapr.report.sweep.doubt import SHARE, evidence, explanation, is_doubtful
from heapr.report.sweep.factors import RESULTLESS, flat, header, paths_of, selected, show
from heapr.report.sweep.published_results import Numbers
from heapr.report.sweep.report_layout import Entry
from heapr.report.sweep.results import JobResult, Jobs, finished
from heapr.report.sweep.scales import limits, ratio_axis, share_logarithmic
from heapr.report.sweep.series import Series, by_model, series_of
from heapr.report.sweep.style import DENSE_LINE, HOLLOW, legend_above, look, panels
from heapr.report.sweep.table import Remarks, build_table
from heapr.report.sweep.table_parts import NOT_MEASURED, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Of an axis with zero and large numbers.
LARGE_TICKS = [digit * 10.0**power for power in range(6) for digit in (2, 5, 10)]
TICKS = (0.0, 0.5, 1.0, *LARGE_TICKS)
WITHOUT_INFLUENCE = {"pruning.save_checkpoint", "calibration.batch_size"}


def relative_table(entry: Entry, jobs: Jobs, published: Numbers) -> Table:
    """Build a table of shares; a job without a baseline is a gap with a note."""
    shared, remarks = with_shares(entry, jobs)
    names = tuple(map(share_name, entry.metrics))
    return build_table(replace(entry, metrics=names), shared, (), remarks)


def relative_curve(entry: Entry, jobs: Jobs, published: Numbers) -> list[Drawing]:
    """Draw shares against the ratio, a panel per metric; the baseline itself is the line at 1.

    Every model has a figure of its own.
    """
    shared, remarks = with_shares(entry, jobs)
    columns = [share_name(name) for name in entry.metrics]
    chosen = selected(shared, entry.where)
    baselines = {job.number for job in selected(chosen, entry.baseline)}
    drawings = []
    others = [job for job in chosen if job.number not in baselines]
    for model, of_model in by_model(others):
        figure, axes = panels(len(entry.metrics), height=1.75, sharex=True)
        all_series = list(enumerate(series_of(of_model, entry, x="ratio")))
        # The legend lists them from the highest to the lowest.
        all_series.sort(key=lambda found: _height(found[1], columns[0]), reverse=True)
        for axis, column in zip(axes, columns, strict=True):
            for number, series in all_series:
                _line(axis, series, column, number)
        _finish(axes, entry)
        ratio_axis(axes[-1], of_model)
        legend_above(figure, axes)
        points = [point for _, series in all_series for point in series.points]
        missing = [_missing(of_model, columns, remarks), explanation(points, columns, mark="Hollow")]
        drawings.append(Drawing(figure, model, " ".join(filter(None, missing))))
    return drawings


def share_name(metric: str) -> str:
    """Return the name of a metric's share in `with_shares`.

    A metric that is not compared with the dense model keeps its own name.
    """
    return f"{SHARE}/{metric}" if metric.partition("/")[0] in metrics.COMPARED else metric


def with_shares(entry: Entry, jobs: Jobs, prefix: str = SHARE) -> tuple[list[JobResult], Remarks]:
    """Add shares of the entry's metrics to the jobs that have a baseline.

    Args:
        entry: its metrics and baseline.
        jobs: of the sweep; every job's baseline is looked for among them.
        prefix: of the shares' names.

    Returns:
        All jobs, with their shares in their comparison, and beside each share the baseline's increase and
        its standard error; and why a share is missing, by the job's number and the share's name.

    Raises:
        ConfigError: a job has two baselines, which differ.
    """
    baselines: dict[str, JobResult] = {}
    for job in finished(selected(jobs, entry.baseline)):
        first = baselines.setdefault(_conditions(job, entry.baseline), job)
        _check_same(first, job, entry.baseline)
    compared = [name for name in entry.metrics if share_name(name) != name]
    described = _described(entry.baseline)
    found = []
    remarks: dict[tuple[int, str], str] = {}
    for job in jobs:
        baseline = baselines.get(_conditions(job, entry.baseline))
        numbers: dict[str, float] = {}
        for name in compared if job.summary is not None else ():
            share = None if baseline is None else metrics.share_of_increase(job, baseline, name)
            if share is None:
                remarks[job.number, share_name(name)] = _reason(job, baseline, name, described)
            else:
                numbers[name] = share
            if baseline is not None:
                numbers |= evidence(baseline, name)
        named = {f"{prefix}/{name}": number for name, number in numbers.items()}
        found.append(_with_comparison(job, named) if named else job)
    return found, remarks


def _missing(jobs: Jobs, columns: Sequence[str], remarks: Remarks) -> str:
    """Name the jobs that lack a share."""
    lacking = {number for number, column in remarks if column in columns}
    numbers = [str(job.number) for job in jobs if job.number in lacking]
    if not numbers:
        return ""
    return f"Not drawn, because the baseline or a number is missing: jobs {', '.join(numbers)}."


def _reason(job: JobResult, baseline: JobResult | None, name: str, described: str) -> str:
    """Say why there is no share."""
    if metrics.increase(job, name) is None:
        return NOT_MEASURED
    if baseline is None:
        return f"No finished job with {described} and all else equal."
    if metrics.increase(baseline, name) is None:
        return f"Not measured with {described}: {metrics.label(name)}."
    return f"No worse than unpruned with {described}: {metrics.label(name)}."


def for_csv(entries: Sequence[Entry], jobs: Jobs) -> list[JobResult]:
    """Return the jobs with the shares of all entries, under names that contain the baseline."""
    found = list(jobs)
    for entry in entries:
        if entry.baseline:
            found, _ = with_shares(entry, found, prefix=f"{SHARE} to {_described(entry.baseline)}")
    return found


def _conditions(job: JobResult, baseline: Mapping[str, Any]) -> str:
    """Return the settings that a job and its baseline must share: all but those that the baseline names."""
    named = [path for name in baseline for path in paths_of(name)]
    settings = _settings(job)
    shared = [path for path in settings if not any(_is_in(path, name) for name in named)]
    return json.dumps({path: settings[path] for path in shared})


def _settings(job: JobResult) -> dict[str, Any]:
    """Return the fields of a job's configuration that change a result."""
    settings = {}
    for path, value in sorted(flat(job.config).items()):
        group = path.partition(".")[0]
        if group not in RESULTLESS and path not in WITHOUT_INFLUENCE:
            settings[path] = value
    return settings


def _is_in(path: str, name: str) -> bool:
    return path == name or path.startswith(f"{name}.")


def _check_same(first: JobResult, second: JobResult, baseline: Mapping[str, Any]) -> None:
    ours, theirs = _settings(first), _settings(second)
    for path in ours | theirs:
        if ours.get(path) != theirs.get(path):
            raise ConfigError(
                f"jobs {first.number} and {second.number} could both be the baseline"
                f" ({_described(baseline)}), but differ in {path}; add it to the baseline"
            )


def _with_comparison(job: JobResult, shares: Mapping[str, float]) -> JobResult:
    assert job.summary is not None
    comparison = {**job.metrics["comparison"], **shares}
    changed = {**job.metrics, "comparison": comparison}
    return replace(job, summary={**job.summary, "metrics": changed})


def _described(baseline: Mapping[str, Any]) -> str:
    return ", ".join(f"{header(name)} {show(name, value)}" for name, value in baseline.items())


def _height(series: Series, metric: str) -> float:
    """Return the mean of a line."""
    means = [point.mean for point in series.values(metric)]
    return statistics.fmean(means or [0.0])


def _line(axis: Axes, series: Series, metric: str, number: int) -> None:
    how = look(number)
    points = series.values(metric)
    xs = [100 * ratio for ratio in series.factors(points, "ratio")]
    draw_line(axis, xs, points, series.label, how)
    doubtful_xs, doubtful_ys = [], []
    for x, point in zip(xs, points, strict=True):
        if is_doubtful(series.points[point.number], metric):
            doubtful_xs.append(x)
            doubtful_ys.append(point.mean)
    if doubtful_xs:
        hollow: dict[str, Any] = {"linestyle": "none", "markerfacecolor": "white"}
        axis.plot(doubtful_xs, doubtful_ys, zorder=3, **(how | hollow))
        axis.plot([], [], color="grey", marker="o", label=HOLLOW, **hollow)


def _finish(axes: Sequence[Axes], entry: Entry) -> None:
    """Add the labels and the baseline's line, and choose the scale: one for the shares of all panels."""
    name = " ".join(show(name, value) for name, value in entry.baseline.items())
    of_shares = []
    for axis, metric in zip(axes, entry.metrics, strict=True):
        if share_name(metric) == metric:
            axis.set_ylabel(metrics.axis_label(metric))
            continue
        axis.axhline(1.0, label=f"{name} (baseline)", zorder=1.5, **DENSE_LINE)
        axis.set_ylabel(metrics.label(share_name(metric)).replace(", ", ",\n"))
        of_shares.append(axis)
    if share_logarithmic(of_shares, least_span=8):
        return
    ends = [limits(axis) for axis in of_shares]
    is_wide = any(highest > 8 for _, highest in ends)
    for axis, (lowest, highest) in zip(of_shares, ends, strict=True):
        if is_wide:
            _signed_logarithmic(axis, lowest, highest)
        else:
            axis.set_ylim(bottom=min(0.0, axis.get_ylim()[0]))


def _signed_logarithmic(axis: Axes, lowest: float, highest: float) -> None:
    """Make the axis linear up to 1 and logarithmic above, for shares at or below zero beside large ones.

    Such a share means no worse than the unpruned model.
    """
    from matplotlib.ticker import FuncFormatter

    axis.set_yscale("symlog", linthresh=1.0)
    axis.set_ylim(lowest - 0.1, 1.4 * highest)
    axis.set_yticks([tick for tick in TICKS if tick <= highest])
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
