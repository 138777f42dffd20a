"""What a report says first: with what its results were made, where, how long it took, and on which text.

In: the jobs of a sweep. Out: lines, each with its name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from heapr.report.sweep.factors import factor, show
from heapr.report.sweep.results import Jobs, artifact_seconds, finished

COMMIT_DIGITS = 10
LIBRARIES = ("torch", "transformers")


def facts(jobs: Jobs) -> dict[str, str]:
    """Return the lines of the head by their names; what no job knows is left out."""
    done = finished(jobs)
    summaries = [job.summary for job in done if job.summary is not None]
    environments = [summary["environment"] for summary in summaries if "environment" in summary]
    lines = {
        "made with": _distinct(_versions(environment) for environment in environments),
        "on": _distinct(_machine(environment["machine"]) for environment in environments),
        "took": _duration(done, environments),
        "models": _distinct(_model(job.config) for job in done),
        "calibrated on": _calibration(done),
    }
    return {name: text for name, text in lines.items() if text}


def _versions(environment: Mapping[str, Any]) -> str:
    commit = environment["git_commit"]
    of_commit = f" (commit {commit[:COMMIT_DIGITS]})" if commit else ""
    libraries = [f"{name} {environment['libraries'][name]}" for name in LIBRARIES]
    return ", ".join([f"heapr {environment['version']}{of_commit}", *libraries])


def _machine(machine: Mapping[str, Any]) -> str:
    if machine["device"] == "cuda":
        return f"GPU {machine['name']}"
    threads = machine["threads"]
    return f"CPU {machine['name']}, {threads} thread{'' if threads == 1 else 's'}"


def _duration(done: Jobs, environments: Iterable[Mapping[str, Any]]) -> str:
    """Say how long the jobs ran, and how long it took to make what they used, here or earlier."""
    texts = []
    of_jobs = [environment["seconds"] for environment in environments]
    if of_jobs:
        texts.append(f"{_time(sum(of_jobs))} for {len(of_jobs)} job{'' if len(of_jobs) == 1 else 's'}")
    of_artifacts = artifact_seconds(done)
    if of_artifacts:
        total = _time(sum(of_artifacts.values()))
        texts.append(f"{total} to make their {len(of_artifacts)} artifacts, now or earlier")
    return "; ".join(texts)


def _time(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def _model(config: Mapping[str, Any]) -> str:
    model = config["model"]
    return f"{model['name']} ({model['path']}, {model['dtype']})"


def _calibration(done: Jobs) -> str:
    """Say which calibrations the jobs had: the values of each setting, separated by commas."""
    values = {}
    for name in ("num_samples", "sequence_length", "corpus", "seed"):
        found = dict.fromkeys(show(name, factor(job, name)) for job in done)
        values[name] = ", ".join(found)
    if not done:
        return ""
    return (
        f"{values['num_samples']} sequences of {values['sequence_length']} tokens of {values['corpus']}, seed"
        f" {values['seed']}"
    )


def _distinct(texts: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(texts))
