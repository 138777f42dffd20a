"""What a sweep would do, on the console.

In: a forecast. Out: a table of its jobs, and what is left to make.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from heapr.report.terminal import open_console, operations, print_lines
from heapr.store.inventory import STAGES
from heapr.sweep.definition import Job
from heapr.sweep.forecast import Forecast


def print_forecast(
    forecast: Forecast, title: str, waves: Sequence[Sequence[int]] = (), *, console: Console | None = None
) -> None:
    """Print the jobs, which of their artifacts exist or are shared, and the expected time.

    Args:
        forecast: of the sweep.
        title: above the table.
        waves: numbers of the jobs that start together, if a launcher runs them side by side.
        console: to print on; standard output by default.
    """
    overrides = [job.overrides for job in forecast.jobs]
    common = common_overrides(overrides)
    console = console or open_console()
    print_lines(console, title, style="bold")
    if common:
        print_lines(console, f"every job: {' '.join(common)}")
    console.print(_jobs_table(forecast, common))
    for problem in _problems(forecast):
        print_lines(console, problem, style="yellow")
    print_lines(console, _what_is_left(forecast))
    if len(waves) > 1:
        first, second = waves[:2]
        numbers = ", ".join(map(str, first))
        print_lines(
            console,
            f"in {len(waves)} waves: job {numbers} first, which makes what others share, then the other"
            f" {len(second)}",
        )


def common_overrides(jobs: Sequence[Job]) -> Job:
    """Return the overrides that all jobs have; empty for a single job."""
    if len(jobs) <= 1:
        return ()
    first, *others = jobs
    common = list(first)
    for job in others:
        common = [override for override in common if override in job]
    return tuple(common)


def _jobs_table(forecast: Forecast, common: Job) -> Table:
    table = Table("", "job", *STAGES, box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.columns[1].overflow = "fold"
    for number, job in enumerate(forecast.jobs):
        own = [override for override in job.overrides if override not in common]
        overrides = Text(" ".join(own) or "-")
        states = forecast.states(number)
        cells = [_cell(states[stage]) for stage in STAGES]
        table.add_row(str(number), overrides, *cells)
    return table


def _problems(forecast: Forecast) -> list[str]:
    """Return each problem once, with the jobs that have it."""
    numbers: dict[str, list[str]] = {}
    for number, job in enumerate(forecast.jobs):
        if job.problem:
            numbers.setdefault(job.problem, []).append(str(number))
    return [f"job {', '.join(having)}: {problem}\n" for problem, having in numbers.items()]


def _cell(states: Counter[str]) -> str:
    if sum(states.values()) <= 1:
        return next(iter(states), "?")
    return "\n".join(f"{count} {state}" for state, count in sorted(states.items()))


def _what_is_left(forecast: Forecast) -> str:
    left = forecast.to_make()
    lines = [_counts(forecast)]
    seconds = [number for number in forecast.seconds.values() if number is not None]
    if seconds:
        minutes = sum(seconds) / 60
        lines.append(
            f"estimated from earlier ones like them: {minutes:.1f} min for {len(seconds)} of {len(left)}"
        )
    elif left:
        lines.append("no estimate of the time: nothing like them was made here before")
    flops = [number for number in forecast.flops.values() if number is not None]
    if flops:
        total = operations(sum(flops))
        lines.append(f"arithmetic of calibrating, where nothing like it was done before: {total}")
    return "\n".join(lines)


def _counts(forecast: Forecast) -> str:
    """Say how many jobs and distinct artifacts there are, and how many artifacts of each stage to make."""
    jobs = f"{len(forecast.jobs)} jobs"
    num_unknown = sum(not job.steps for job in forecast.jobs)
    if num_unknown:
        jobs += f" ({num_unknown} unknown)"
    artifacts = {step.id for job in forecast.jobs for step in job.steps}
    left = forecast.to_make()
    to_make = "none"
    if left:
        numbers = Counter(step.stage for step in left.values())
        to_make = ", ".join(f"{numbers[stage]} {stage}" for stage in STAGES)
    return f"{jobs}, {len(artifacts)} artifacts; to make: {to_make}"
