"""Published numbers under our names.

In: the folder of results.csv. Out: values by model, ratio, criterion, scope and metric, each with its source.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from heapr.errors import ConfigError
from heapr.report.sweep.factors import factor, model_names
from heapr.report.sweep.results import JobResult

RESULTS = "results.csv"
METHODS = {  # as published: criterion and scope
    "Original": ("", ""),
    "HEAPr-G": ("heapr", "global"),
    "HEAPr-L": ("heapr", "layer"),
    "CAMERA-P": ("camera", "layer"),
    "CAMERA-P(layer)": ("camera", "layer"),
    "atomic-level pruning": ("heapr", "global"),
    "expert-level pruning (same score summed)": ("heapr_expert", "global"),
    "Frequency-prune": ("frequency", "layer"),
}
METRICS = {
    "wikitext2_ppl": "perplexity/wikitext2",
    "ptb_ppl": "perplexity/ptb",
    "c4_ppl": "perplexity/c4",
    "avg7_acc": "accuracy/average",
    "avg7_acc_norm": "accuracy_norm/average",
    "flops_reduction_percent": "size/flops_removed_ratio",
}
AVERAGES = ("accuracy/average", "accuracy_norm/average")
# By avg7_acc and avg7_acc_norm.
AVERAGED = {
    "openbookqa",
    "arc_easy",
    "winogrande",
    "hellaswag",
    "arc_challenge",
    "piqa",
    "mathqa",
}
# A method's own newest release first; then the sources that the paper took its baselines from. What is known
# of their protocols:
SOURCES = {
    "HEAPr README, 2026-02-20": "128 calibration sequences of 2048 tokens, perplexity over windows of 2048",
    "HEAPr README, 2025-10-13": "128 calibration sequences of 2048 tokens, perplexity over windows of 2048",
    "HEAPr paper": "128 calibration sequences of 2048 tokens, perplexity over windows of 2048",
    "D2-MoE": "512 calibration sequences, accuracies as whole percents",
    "Sub-MoE": "other zero-shot tasks in its averages, accuracies as whole percents",
    "CAMERA": "other zero-shot tasks in its averages",
}
DENSE = ("", "")


@dataclass(frozen=True)
class Number:
    """One published number.

    Attributes:
        model, ratio, method: criterion and scope in our names, `DENSE` for the unpruned model.
        metric, value: under our name and in our unit: shares, not percent.
        source: where it was printed.
    """

    model: str
    ratio: float
    method: tuple[str, str]
    metric: str
    value: float
    source: str


def read_published(folder: Path | None) -> list[Number]:
    """All published numbers that have a counterpart here; none without a folder.

    Raises:
        ConfigError: the folder holds no results.csv.
    """
    if folder is None:
        return []
    path = folder / RESULTS
    if not path.is_file():
        raise ConfigError(
            f"no published numbers in '{folder}': {RESULTS} is missing; give the folder that holds it"
        )
    with path.open(newline="", encoding="utf-8") as file:
        rows = [
            row
            for row in csv.DictReader(file)
            if row["method"] in METHODS and _metric(row["metric"]) is not None
        ]
    return sorted((_number(row) for row in rows), key=lambda number: _rank(number.source))


def find(numbers: Sequence[Number], job: JobResult, metric: str, *, dense: bool = False) -> Number | None:
    """The number that stands beside a job's, from the preferred source; none if there is none.

    Averages are compared only where the same seven tasks were averaged.
    """
    if metric in AVERAGES and not _averages_the_same(job):
        return None
    method = DENSE if dense else (factor(job, "criterion"), factor(job, "scope"))
    ratio = 0.0 if dense else factor(job, "ratio")
    names = {_plain(name) for name in model_names(job)}
    fitting = (
        n
        for n in numbers
        if n.metric == metric and n.method == method and _plain(n.model) in names and _same(n.ratio, ratio)
    )
    return next(fitting, None)


def curve(numbers: Sequence[Number], job: JobResult, metric: str) -> list[tuple[float, float]]:
    """All published (ratio, value) of a job's model, criterion and scope, one per ratio, by ratio."""
    if metric in AVERAGES and not _averages_the_same(job):
        return []
    names = {_plain(name) for name in model_names(job)}
    method = (factor(job, "criterion"), factor(job, "scope"))
    points: dict[float, float] = {}
    for number in numbers:
        if number.metric == metric and number.method == method and _plain(number.model) in names:
            points.setdefault(number.ratio, number.value)
    return sorted(points.items())


def _number(row: dict[str, str]) -> Number:
    metric = _metric(row["metric"])
    assert metric is not None, "filtered before"
    share = 1.0 if metric.startswith("perplexity/") else 0.01
    return Number(
        row["model"],
        float(row["ratio"]),
        METHODS[row["method"]],
        metric,
        float(row["value"]) * share,
        row["source"],
    )


def _metric(published: str) -> str | None:
    if published in METRICS:
        return METRICS[published]
    task = published.removesuffix("_acc")
    return f"accuracy/{task}" if task != published and not re.fullmatch(r"avg\d+", task) else None


def protocol_note(source: str) -> str:
    """Where a number was printed, and what is known of how it was measured."""
    known = next(
        (protocol for beginning, protocol in SOURCES.items() if source.startswith(beginning)),
        "protocol not known",
    )
    return f"Published in {source}: {known}."


def _rank(source: str) -> int:
    return next(
        (rank for rank, beginning in enumerate(SOURCES) if source.startswith(beginning)), len(SOURCES)
    )


def _averages_the_same(job: JobResult) -> bool:
    tasks = {
        name.removeprefix("accuracy/")
        for name in job.metrics.get("pruned", {})
        if name.startswith("accuracy/")
    }
    return tasks - {"average"} == AVERAGED


def _same(ratio: float, other: float | str) -> bool:
    return isinstance(other, float | int) and math.isclose(ratio, other, abs_tol=1e-6)


def _plain(name: str) -> str:
    """Letters and digits alone, so that spellings of a model's name agree."""
    return re.sub(r"[^a-z0-9]", "", name.lower())
