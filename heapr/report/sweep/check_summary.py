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
    stages = summary.get("stages")
    if not isinstance(stages, list) or not all(map(_is_stage, stages)):
        return "stages is not a list of stages with their paths"
    return _problem_of_values(summary) or _problem_of_config(summary["config"])


def _is_stage(entry: Any) -> bool:
    if not isinstance(entry, Mapping):
        return False
    has_names = all(isinstance(entry.get(name), str) for name in ("stage", "path"))
    return has_names and isinstance(entry.get("cached"), bool)


def _problem_of_values(summary: Mapping[str, Any]) -> str | None:
    for group, values in summary["metrics"].items():
        if not isinstance(values, Mapping):
            return f"metrics.{group} is not an object"
        for name, value in values.items():
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not math.isfinite(value):
                return f"metrics.{group}.{name} is not a finite number"
    for model, records in summary["protocols"].items():
        if not isinstance(records, Mapping):
            return f"protocols.{model} is not an object"
    return None


def _problem_of_config(config: Mapping[str, Any]) -> str | None:
    for name in SECTIONS:
        if not isinstance(config.get(name), Mapping):
            return f"config.{name} is not an object"
    if not isinstance(config["score"].get("_target_"), str):
        return "config.score has no _target_"
    corpus = config["calibration"].get("corpus")
    if not isinstance(corpus, Mapping) or not isinstance(corpus.get("_target_"), str):
        return "config.calibration.corpus has no _target_"
    if not isinstance(config["pruning"].get("ratio"), int | float):
        return "config.pruning.ratio is not a number"
    return None
