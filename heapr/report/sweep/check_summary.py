"""Whether the summary of a job has what a report reads: a file that was edited or cut ends in one line.

In: the content of a summary.json. Out: nothing, or what is wrong with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

SECTIONS = ("model", "calibration", "score", "pruning")  # of the configuration


def problem_of(summary: Any) -> str | None:
    """What is wrong with a summary; None if nothing is."""
    if not isinstance(summary, Mapping):
        return "it is not an object"
    for name in ("metrics", "protocols", "config"):
        if not isinstance(summary.get(name), Mapping):
            return f"{name} is not an object"
    return (
        _problem_of_stages(summary.get("stages"))
        or _problem_of_metrics(summary["metrics"])
        or _problem_of_protocols(summary["protocols"])
        or _problem_of_config(summary["config"])
    )


def _problem_of_stages(stages: Any) -> str | None:
    if isinstance(stages, list) and all(map(_is_stage, stages)):
        return None
    return "stages is not a list of stages with their paths"


def _is_stage(entry: Any) -> bool:
    if not isinstance(entry, Mapping):
        return False
    has_names = all(isinstance(entry.get(name), str) for name in ("stage", "path"))
    return has_names and isinstance(entry.get("cached"), bool)


def _problem_of_metrics(metrics: Mapping[str, Any]) -> str | None:
    for group, values in metrics.items():
        if not isinstance(values, Mapping):
            return f"metrics.{group} is not an object"
        for name, value in values.items():
            if not _is_finite_number(value):
                return f"metrics.{group}.{name} is not a finite number"
    return None


def _is_finite_number(value: Any) -> bool:
    """Whether a value is an int or a float; bool, which is an int in Python, is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value)


def _problem_of_protocols(protocols: Mapping[str, Any]) -> str | None:
    for model, records in protocols.items():
        if not isinstance(records, Mapping):
            return f"protocols.{model} is not an object"
    return None


def _problem_of_config(config: Mapping[str, Any]) -> str | None:
    for name in SECTIONS:
        if not isinstance(config.get(name), Mapping):
            return f"config.{name} is not an object"
    if not _has_target(config["score"]):
        return "config.score has no _target_"
    corpus = config["calibration"].get("corpus")
    if not _has_target(corpus):
        return "config.calibration.corpus has no _target_"
    ratio = config["pruning"].get("ratio")
    if not isinstance(ratio, int | float):
        return "config.pruning.ratio is not a number"
    return None


def _has_target(entry: Any) -> bool:
    return isinstance(entry, Mapping) and isinstance(entry.get("_target_"), str)
