"""A metric's increase over the dense model's, as a share of a baseline's increase.

In: an entry of the layout and the jobs of a sweep. Out: the jobs with shares among their numbers, and why
shares are missing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from heapr.errors import ConfigError
from heapr.report.sweep import metrics
from heapr.report.sweep.doubt import SHARE, evidence
from heapr.report.sweep.factors import RESULTLESS, flat, header, paths_of, selected, show
from heapr.report.sweep.report_layout import Entry
from heapr.report.sweep.results import JobResult, Jobs, finished
from heapr.report.sweep.table_parts import NOT_MEASURED

WITHOUT_INFLUENCE = {"pruning.save_checkpoint", "calibration.batch_size"}

Settings = Mapping[str, Any]  # values by dotted path of the configuration, or by factor
Remarks = Mapping[tuple[int, str], str]  # by the job's number and the metric's name


def share_name(metric: str) -> str:
    """Return the name of a metric's share in `with_shares`.

    A metric that is not compared with the dense model keeps its own name.
    """
    return f"{SHARE}/{metric}" if metric.partition("/")[0] in metrics.COMPARED else metric


def columns_of(entry: Entry) -> tuple[str, ...]:
    """Return the names of the shares of an entry's metrics, in order."""
    return tuple(share_name(metric) for metric in entry.metrics)


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
    baselines = _baselines(entry, jobs)
    compared = [name for name in entry.metrics if share_name(name) != name]
    described = _described(entry.baseline)
    found = []
    remarks: dict[tuple[int, str], str] = {}
    for job in jobs:
        if job.summary is None:
            found.append(job)
            continue
        conditions = _conditions(job, entry.baseline)
        baseline = baselines.get(conditions)
        shares = _shares(job, baseline, compared)
        for name in compared:
            if name not in shares:
                remarks[job.number, share_name(name)] = _reason(job, baseline, name, described)
        named = {f"{prefix}/{name}": number for name, number in shares.items()}
        found.append(_with_comparison(job, named))
    return found, remarks


def for_csv(entries: Sequence[Entry], jobs: Jobs) -> list[JobResult]:
    """Return the jobs with the shares of all entries, under names that contain the baseline."""
    found = list(jobs)
    for entry in entries:
        if entry.baseline:
            prefix = f"{SHARE} to {_described(entry.baseline)}"
            found, _ = with_shares(entry, found, prefix)
    return found


def _baselines(entry: Entry, jobs: Jobs) -> dict[str, JobResult]:
    """Return the first finished baseline under each set of conditions."""
    baselines: dict[str, JobResult] = {}
    candidates = selected(jobs, entry.baseline)
    for job in finished(candidates):
        conditions = _conditions(job, entry.baseline)
        first = baselines.setdefault(conditions, job)
        _check_same(first, job, entry.baseline)
    return baselines


def _shares(job: JobResult, baseline: JobResult | None, names: Sequence[str]) -> dict[str, float]:
    """Return a job's shares by metric, and beside each the evidence that it means something."""
    if baseline is None:
        return {}
    numbers: dict[str, float] = {}
    for name in names:
        share = metrics.share_of_increase(job, baseline, name)
        if share is not None:
            numbers[name] = share
        numbers |= evidence(baseline, name)
    return numbers


def _reason(job: JobResult, baseline: JobResult | None, name: str, described: str) -> str:
    """Say why there is no share."""
    if metrics.increase(job, name) is None:
        return NOT_MEASURED
    if baseline is None:
        return f"No finished job with {described} and all else equal."
    if metrics.increase(baseline, name) is None:
        return f"Not measured with {described}: {metrics.label(name)}."
    return f"No worse than unpruned with {described}: {metrics.label(name)}."


def _conditions(job: JobResult, baseline: Settings) -> str:
    """Return the settings that a job and its baseline must share: all but those that the baseline names."""
    named = [path for name in baseline for path in paths_of(name)]
    settings = _settings(job)
    shared = {path: value for path, value in settings.items() if not _is_in_any(path, named)}
    return json.dumps(shared)


def _settings(job: JobResult) -> dict[str, Any]:
    """Return the fields of a job's configuration that change a result."""
    settings = {}
    for path, value in sorted(flat(job.config).items()):
        group = path.partition(".")[0]
        if group not in RESULTLESS and path not in WITHOUT_INFLUENCE:
            settings[path] = value
    return settings


def _is_in_any(path: str, names: Sequence[str]) -> bool:
    """Return whether a dotted path is one of the names, or lies in a group of that name."""
    groups = tuple(f"{name}." for name in names)
    return path in names or path.startswith(groups)


def _check_same(first: JobResult, second: JobResult, baseline: Settings) -> None:
    ours, theirs = _settings(first), _settings(second)
    for path in ours | theirs:
        if ours.get(path) != theirs.get(path):
            raise ConfigError(
                f"jobs {first.number} and {second.number} could both be the baseline"
                f" ({_described(baseline)}), but differ in {path}; add it to the baseline"
            )


def _with_comparison(job: JobResult, shares: Mapping[str, float]) -> JobResult:
    """Return the job with shares among the metrics that compare two models."""
    if not shares:
        return job
    assert job.summary is not None
    comparison = {**job.metrics["comparison"], **shares}
    changed = {**job.metrics, "comparison": comparison}
    summary = {**job.summary, "metrics": changed}
    return replace(job, summary=summary)


def _described(baseline: Settings) -> str:
    return ", ".join(f"{header(name)} {show(name, value)}" for name, value in baseline.items())
