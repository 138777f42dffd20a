"""The plan of a sweep on the console.

In: a plan. Out: a table of its jobs, and what is left to make.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from heapr.report.console import open_console, print_lines
from heapr.report.dry_run import operations
from heapr.sweep.definition import Job
from heapr.sweep.plan import STAGES, SweepPlan


def print_plan(plan: SweepPlan, title: str, console: Console | None = None) -> None:
    """Jobs, what of them is in the store or shared, and the expected time."""
    common = common_overrides([job.overrides for job in plan.jobs])
    console = console or open_console()
    print_lines(console, title, style="bold")
    if common:
        print_lines(console, f"every job: {' '.join(common)}")
    console.print(_jobs_table(plan, common))
    for problem in _problems(plan):
        print_lines(console, problem, style="yellow")
    print_lines(console, _what_is_left(plan))


def common_overrides(jobs: Sequence[Job]) -> Job:
    """What all jobs say."""
    return tuple(override for override in jobs[0] if all(override in job for job in jobs)) if len(jobs) > 1 else ()


def _jobs_table(plan: SweepPlan, common: Job) -> Table:
    table = Table("", "job", *STAGES, box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.columns[1].overflow = "fold"
    for number, job in enumerate(plan.jobs):
        overrides = Text(" ".join(override for override in job.overrides if override not in common) or "-")
        states = plan.states(number)
        table.add_row(str(number), overrides, *(_cell(states[stage]) for stage in STAGES))
    return table


def _problems(plan: SweepPlan) -> list[str]:
    """Each problem once, with the jobs that have it."""
    problems = dict.fromkeys(job.problem for job in plan.jobs if job.problem)
    numbers = {problem: [str(number) for number, job in enumerate(plan.jobs) if job.problem == problem] for problem in problems}
    return [f"job {', '.join(numbers[problem])}: {problem}\n" for problem in problems]


def _cell(states: Counter[str]) -> str:
    if sum(states.values()) <= 1:
        return next(iter(states), "?")
    return "\n".join(f"{count} {state}" for state, count in sorted(states.items()))


def _what_is_left(plan: SweepPlan) -> str:
    left = plan.to_make()
    numbers = Counter(stage.stage for stage in left.values())
    counted = ", ".join(f"{numbers[stage]} {stage}" for stage in STAGES)
    distinct = len({stage.name for job in plan.jobs for stage in job.stages})
    unknown = sum(not job.stages for job in plan.jobs)
    jobs = f"{len(plan.jobs)} jobs" + (f" ({unknown} cannot be planned)" if unknown else "")
    lines = [f"{jobs}, {distinct} artifacts, of which to make: {counted if left else 'none'}"]
    known = [seconds for seconds in plan.seconds.values() if seconds is not None]
    if known:
        lines.append(f"estimated from earlier ones like them: {sum(known) / 60:.1f} min for {len(known)} of {len(left)}")
    elif left:
        lines.append("no estimate of the time: nothing like them was made here before")
    flops = [number for number in plan.flops.values() if number is not None]
    if flops:
        lines.append(f"arithmetic of calibrating, where nothing like it was done before: {operations(sum(flops))}")
    return "\n".join(lines)
