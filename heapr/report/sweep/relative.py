"""How much of a baseline's damage is left: a metric's increase over the dense model's, as a share of the
baseline's increase.

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
from heapr.report.sweep.curves import Drawing, Series, by_model, limits, logarithmic, ratio_axis, series_of
from heapr.report.sweep.doubt import SHARE, evidence, explanation, is_doubtful
from heapr.report.sweep.factors import RESULTLESS, factor, flat, header, paths_of, selected, show
from heapr.report.sweep.published_results import Number
from heapr.report.sweep.report_layout import Entry
from heapr.report.sweep.results import JobResult, finished
from heapr.report.sweep.style import DENSE_LINE, HOLLOW, legend_above, look, panels
from heapr.report.sweep.table import NOT_MEASURED, Remarks, Table, build_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Where zero and large numbers share an axis.
TICKS = (
    0.0,
    0.5,
    1.0,
    *(digit * 10.0**power for power in range(6) for digit in (2, 5, 10)),
)
WITHOUT_INFLUENCE = {"pruning.save_checkpoint", "calibration.batch_size"}


def relative_table(entry: Entry, jobs: Sequence[JobResult], published: Sequence[Number]) -> Table:
    """Rows as those of any table; what has no baseline is a gap with a note."""
    shared, remarks = with_shares(entry, jobs)
    names = tuple(map(share_name, entry.metrics))
    return build_table(replace(entry, metrics=names), shared, (), remarks)


def relative_curve(entry: Entry, jobs: Sequence[JobResult], published: Sequence[Number]) -> list[Drawing]:
    """Shares against the ratio, a panel per metric, one figure per model; the baseline itself is the line at
    1."""
    shared, remarks = with_shares(entry, jobs)
    columns = [share_name(name) for name in entry.metrics]
    chosen = selected(shared, entry.where)
    baselines = {job.number for job in selected(chosen, entry.baseline)}
    drawings = []
    for model, of_model in by_model([job for job in chosen if job.number not in baselines]):
        figure, axes = panels(len(entry.metrics), height=1.75, sharex=True)
        all_series = list(enumerate(series_of(of_model, entry, x="ratio")))
        # As the legend lists them.
        all_series.sort(key=lambda found: _height(found[1], columns[0]), reverse=True)
        for axis, name, column in zip(axes, entry.metrics, columns, strict=True):
            for number, series in all_series:
                _line(axis, series, column, number)
            _finish(axis, name, entry.baseline)
        ratio_axis(axes[-1], of_model)
        legend_above(figure, axes)
        without = [
            str(job.number) for job in of_model if any((job.number, column) in remarks for column in columns)
        ]
        missing = (
            [f"Not drawn, for want of a baseline or of a number: jobs {', '.join(without)}."]
            if without
            else []
        )
        missing += filter(
            None,
            [
                explanation(
                    [point for _, series in all_series for point in series.points], columns, mark="Hollow"
                )
            ],
        )
        drawings.append(Drawing(figure, model, " ".join(missing)))
    return drawings


def share_name(metric: str) -> str:
    """The name that a metric's share has in `with_shares`; of what is no comparison with the dense model, its
    own."""
    return f"{SHARE}/{metric}" if metric.partition("/")[0] in metrics.COMPARED else metric


def with_shares(
    entry: Entry, jobs: Sequence[JobResult], prefix: str = SHARE
) -> tuple[list[JobResult], Remarks]:
    """All jobs, those that have a baseline with shares of the entry's metrics in their comparison, and beside
    each the baseline's increase and its standard error; and why a share is missing, by the job's number and
    the share's name.

    Raises:
        ConfigError: a job has two baselines, which differ.
    """
    baselines: dict[str, JobResult] = {}
    for job in finished(selected(jobs, entry.baseline)):
        _check_same(baselines.setdefault(_conditions(job, entry.baseline), job), job, entry.baseline)
    found = list(jobs)
    remarks: dict[tuple[int, str], str] = {}
    for place, job in enumerate(jobs):
        baseline = baselines.get(_conditions(job, entry.baseline))
        numbers: dict[str, float] = {}
        for name in entry.metrics if job.summary is not None else ():
            if share_name(name) == name:
                continue
            share = None if baseline is None else metrics.share_of_increase(job, baseline, name)
            if share is None:
                remarks[job.number, share_name(name)] = _reason(
                    job, baseline, name, _described(entry.baseline)
                )
            else:
                numbers[name] = share
            numbers |= {} if baseline is None else evidence(baseline, name)
        if numbers:
            found[place] = _with_comparison(
                job, {f"{prefix}/{name}": number for name, number in numbers.items()}
            )
    return found, remarks


def _reason(job: JobResult, baseline: JobResult | None, name: str, described: str) -> str:
    """Why there is no share."""
    if metrics.increase(job, name) is None:
        return NOT_MEASURED
    if baseline is None:
        return f"No finished job with {described} and all else equal."
    if metrics.increase(baseline, name) is None:
        return f"Not measured with {described}: {metrics.label(name)}."
    return f"No worse than unpruned with {described}: {metrics.label(name)}."


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
    return json.dumps(
        {
            path: value
            for path, value in _settings(job).items()
            if not any(_is_in(path, name) for name in named)
        }
    )


def _settings(job: JobResult) -> dict[str, Any]:
    """Of the configuration, what changes a result."""
    fields = flat(job.config)
    return {
        path: fields[path]
        for path in sorted(fields)
        if path.partition(".")[0] not in RESULTLESS and path not in WITHOUT_INFLUENCE
    }


def _is_in(path: str, name: str) -> bool:
    return path == name or path.startswith(f"{name}.")


def _check_same(first: JobResult, second: JobResult, baseline: Mapping[str, Any]) -> None:
    settings = [_settings(job) for job in (first, second)]
    for path in dict.fromkeys([*settings[0], *settings[1]]):
        if settings[0].get(path) != settings[1].get(path):
            raise ConfigError(
                f"jobs {first.number} and {second.number} could both be the baseline"
                f" ({_described(baseline)}), but differ in {path}; add it to the baseline"
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
    how = look(number)
    axis.errorbar(xs, means, yerr=errors if any(errors) else None, capsize=2, label=series.label, **how)
    doubtful = [
        place for place, (point, _, _) in enumerate(found) if is_doubtful(series.points[point], metric)
    ]
    if doubtful:
        hollow = {**how, "linestyle": "none", "markerfacecolor": "white"}
        axis.plot([xs[place] for place in doubtful], [means[place] for place in doubtful], zorder=3, **hollow)
        axis.plot([], [], color="grey", marker="o", markerfacecolor="white", linestyle="none", label=HOLLOW)


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
