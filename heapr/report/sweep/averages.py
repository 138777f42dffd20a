"""Jobs that are averaged together: those of one row of a table, or of one point of a figure.

In: jobs. Out: groups of them.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from heapr.errors import ConfigError
from heapr.report.sweep import metrics
from heapr.report.sweep.factors import PATHS, RESULTLESS, by_values, differing
from heapr.report.sweep.results import JobResult, Jobs, finished


@dataclass(frozen=True)
class Group:
    """The jobs behind one row or point: a single job, or all that are averaged."""

    jobs: tuple[JobResult, ...]

    @property
    def done(self) -> list[JobResult]:
        return finished(self.jobs)

    @property
    def first(self) -> JobResult:
        return (self.done or self.jobs)[0]

    def values(self, metric: str) -> list[float]:
        found = [metrics.value(job, metric) for job in self.done]
        return [number for number in found if number is not None]

    def mean(self, metric: str) -> float | None:
        values = self.values(metric)
        return statistics.fmean(values) if values else None


def grouped(jobs: Jobs, identifying: Sequence[str], average_over: str | None) -> list[Group]:
    """Group the jobs that are averaged together; without an average, every job is a group.

    Args:
        jobs: to group.
        identifying: factors that are equal within a group.
        average_over: factor whose values are averaged.

    Raises:
        ConfigError: jobs of a group differ in more than the factor that is averaged over.
    """
    if average_over is None:
        return [Group((job,)) for job in jobs]
    groups = by_values(jobs, identifying).values()
    for members in groups:
        _check_alike(members, average_over)
    return [Group(tuple(members)) for members in groups]


def _check_alike(jobs: Jobs, average_over: str) -> None:
    """Refuse an average over jobs that differ in anything else that changes a result."""
    last = average_over.rpartition(".")[2]
    for path in differing(jobs):
        is_averaged = path.endswith(f".{last}") or PATHS.get(last) == path
        if path.split(".")[0] not in RESULTLESS and not is_averaged:
            numbers = ", ".join(str(job.number) for job in jobs)
            raise ConfigError(
                f"jobs {numbers} would be averaged over {average_over}, but differ in {path}; add it to rows"
                " or series"
            )
