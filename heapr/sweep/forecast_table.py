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
from heapr.sweep.definition import Job
from heapr.sweep.forecast import STAGES, Forecast


def print_forecast(forecast: Forecast, title: str, console: Console | None = None) -> None:
    """Jobs, what of them is in the store or shared, and the expected time."""
    common = common_overrides([job.overrides for job in forecast.jobs])
    console = console or open_console()
    print_lines(console, title, style="bold")
    if common:
        print_lines(console, f"every job: {' '.join(common)}")
    console.print(_jobs_table(forecast, common))
    for problem in _problems(forecast):
        print_lines(console, problem, style="yellow")
    print_lines(console, _what_is_left(forecast))


def common_overrides(jobs: Sequence[Job]) -> Job:
    """What all jobs say."""
    return (
        tuple(override for override in jobs[0] if all(override in job for job in jobs))
        if len(jobs) > 1
        else ()
    )


def _jobs_table(forecast: Forecast, common: Job) -> Table:
    table = Table("", "job", *STAGES, box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.columns[1].overflow = "fold"
    for number, job in enumerate(forecast.jobs):
        overrides = Text(" ".join(override for override in job.overrides if override not in common) or "-")
        states = forecast.states(number)
        table.add_row(str(number), overrides, *(_cell(states[stage]) for stage in STAGES))
    return table


def _problems(forecast: Forecast) -> list[str]:
    """Each problem once, with the jobs that have it."""
    problems = dict.fromkeys(job.problem for job in forecast.jobs if job.problem)
    numbers = {
        problem: [str(number) for number, job in enumerate(forecast.jobs) if job.problem == problem]
        for problem in problems
    }
    return [f"job {', '.join(numbers[problem])}: {problem}\n" for problem in problems]


def _cell(states: Counter[str]) -> str:
    if sum(states.values()) <= 1:
        return next(iter(states), "?")
    return "\n".join(f"{count} {state}" for state, count in sorted(states.items()))


def _what_is_left(forecast: Forecast) -> str:
    left = forecast.to_make()
    numbers = Counter(step.stage for step in left.values())
    counted = ", ".join(f"{numbers[stage]} {stage}" for stage in STAGES)
    distinct = len({step.id for job in forecast.jobs for step in job.steps})
    unknown = sum(not job.steps for job in forecast.jobs)
    jobs = f"{len(forecast.jobs)} jobs" + (f" ({unknown} unknown)" if unknown else "")
    lines = [f"{jobs}, {distinct} artifacts, of which to make: {counted if left else 'none'}"]
    known = [seconds for seconds in forecast.seconds.values() if seconds is not None]
    if known:
        lines.append(
            f"estimated from earlier ones like them: {sum(known) / 60:.1f} min for {len(known)} of"
            f" {len(left)}"
        )
    elif left:
        lines.append("no estimate of the time: nothing like them was made here before")
    flops = [number for number in forecast.flops.values() if number is not None]
    if flops:
        lines.append(
            f"arithmetic of calibrating, where nothing like it was done before: {operations(sum(flops))}"
        )
    return "\n".join(lines)
