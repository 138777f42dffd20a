"""What a report says first: with what its results were made, where, how long it took, and on which text.

In: the jobs of a sweep. Out: lines, each with its name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from heapr.report.sweep.factors import factor, show
from heapr.report.sweep.results import Jobs, artifact_seconds, finished
from heapr.words import plural

Record = Mapping[str, Any]  # in JSON types

COMMIT_DIGITS = 10
LIBRARIES = ("torch", "transformers")


def facts(jobs: Jobs) -> dict[str, str]:
    """Return the lines of the head by their names; what no job knows is left out."""
    done = finished(jobs)
    environments = _environments(done)
    versions = [_versions(environment) for environment in environments]
    machines = [_machine(environment["machine"]) for environment in environments]
    models = [_model(job.config) for job in done]
    lines = {
        "made with": _distinct(versions),
        "on": _distinct(machines),
        "took": _duration(done, environments),
        "models": _distinct(models),
        "calibrated on": _calibration(done),
    }
    return {name: text for name, text in lines.items() if text}


def _environments(done: Jobs) -> list[Record]:
    """Return what the jobs recorded of versions, machine and time; older summaries have no such record."""
    environments = []
    for job in done:
        assert job.summary is not None
        if "environment" in job.summary:
            environments.append(job.summary["environment"])
    return environments


def _versions(environment: Record) -> str:
    own = f"heapr {environment['version']}"
    commit = environment["git_commit"]
    if commit:
        own += f" (commit {commit[:COMMIT_DIGITS]})"
    versions = environment["libraries"]
    libraries = [f"{name} {versions[name]}" for name in LIBRARIES]
    return ", ".join([own, *libraries])


def _machine(machine: Record) -> str:
    name = machine["name"]
    if machine["device"] == "cuda":
        return f"GPU {name}"
    threads = plural(machine["threads"], "thread")
    return f"CPU {name}, {threads}"


def _duration(done: Jobs, environments: Iterable[Record]) -> str:
    """Say how long the jobs ran, and how long it took to make what they used, here or earlier."""
    texts = []
    of_jobs = [environment["seconds"] for environment in environments]
    if of_jobs:
        total = _time(sum(of_jobs))
        number = plural(len(of_jobs), "job")
        texts.append(f"{total} for {number}")
    of_artifacts = artifact_seconds(done)
    if of_artifacts:
        total = _time(sum(of_artifacts.values()))
        number = plural(len(of_artifacts), "artifact")
        texts.append(f"{total} to make their {number}, now or earlier")
    return "; ".join(texts)


def _time(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.1f} min" if minutes < 60 else f"{minutes / 60:.1f} h"


def _model(config: Record) -> str:
    model = config["model"]
    name, path, dtype = model["name"], model["path"], model["dtype"]
    return f"{name} ({path}, {dtype})"


def _calibration(done: Jobs) -> str:
    """Say which calibrations the jobs had: the values of each setting, separated by commas."""
    if not done:
        return ""
    number = _values("num_samples", done)
    length = _values("sequence_length", done)
    corpus = _values("corpus", done)
    seed = _values("seed", done)
    return f"{number} sequences of {length} tokens of {corpus}, seed {seed}"


def _values(setting: str, done: Jobs) -> str:
    shown = [show(setting, factor(job, setting)) for job in done]
    return ", ".join(dict.fromkeys(shown))


def _distinct(texts: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(texts))
