"""Published numbers under our names.

In: the folder of results.csv. Out: values by model, ratio, criterion, scope and metric, each with its source.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from heapr.errors import ConfigError
from heapr.report.sweep.factors import factor, model_names
from heapr.report.sweep.results import JobResult

RESULTS = "results.csv"
# From a published method to our criterion and scope.
METHODS = {
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
# The tasks in avg7_acc and avg7_acc_norm.
AVERAGED = {
    "openbookqa",
    "arc_easy",
    "winogrande",
    "hellaswag",
    "arc_challenge",
    "piqa",
    "mathqa",
}
# In order of preference, with what is known of their protocols: a method's own newest release first, then the
# sources from which the paper took its baselines.
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
        model: as printed.
        ratio: share of atomic experts removed.
        method: criterion and scope in our names, or `DENSE` for the unpruned model.
        metric: in our name.
        value: in our unit: a share, not percent.
        source: where it was printed.
    """

    model: str
    ratio: float
    method: tuple[str, str]
    metric: str
    value: float
    source: str


Numbers = Sequence[Number]


def read_published(folder: Path | None) -> list[Number]:
    """Read the published numbers that have a counterpart here, the preferred sources first.

    Without a folder there are none.

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
    numbers = []
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            metric = _metric(row["metric"])
            if row["method"] in METHODS and metric is not None:
                numbers.append(_number(row, metric))
    return sorted(numbers, key=lambda number: _rank(number.source))


def find(numbers: Numbers, job: JobResult, metric: str, *, dense: bool = False) -> Number | None:
    """Return the published counterpart of a job's metric, from the preferred source; None if there is none.

    Averages have a counterpart only if the same seven tasks were averaged.
    """
    if metric in AVERAGES and not _averages_the_same(job):
        return None
    method = DENSE if dense else (factor(job, "criterion"), factor(job, "scope"))
    ratio = 0.0 if dense else factor(job, "ratio")
    for number in _fitting(numbers, job, metric, method):
        if _same(number.ratio, ratio):
            return number
    return None


def curve(numbers: Numbers, job: JobResult, metric: str) -> list[tuple[float, float]]:
    """Return the published (ratio, value) of a job's model, criterion and scope, one per ratio, by ratio."""
    if metric in AVERAGES and not _averages_the_same(job):
        return []
    method = (factor(job, "criterion"), factor(job, "scope"))
    points: dict[float, float] = {}
    for number in _fitting(numbers, job, metric, method):
        points.setdefault(number.ratio, number.value)
    return sorted(points.items())


def _fitting(numbers: Numbers, job: JobResult, metric: str, method: tuple[str, str]) -> Iterator[Number]:
    """Yield the numbers of a job's model, of a metric and a method, at any ratio."""
    names = {_plain(name) for name in model_names(job)}
    for number in numbers:
        is_of_model = _plain(number.model) in names
        if is_of_model and number.metric == metric and number.method == method:
            yield number


def _number(row: dict[str, str], metric: str) -> Number:
    unit = 1.0 if metric.startswith("perplexity/") else 0.01
    return Number(
        model=row["model"],
        ratio=float(row["ratio"]),
        method=METHODS[row["method"]],
        metric=metric,
        value=float(row["value"]) * unit,
        source=row["source"],
    )


def _metric(published: str) -> str | None:
    """Return our name of a published metric; None for averages over other sets of tasks, and unknown ones."""
    if published in METRICS:
        return METRICS[published]
    task = published.removesuffix("_acc")
    return f"accuracy/{task}" if task != published and not re.fullmatch(r"avg\d+", task) else None


def protocol_note(source: str) -> str:
    """Say where a number was printed, and what is known of how it was measured."""
    for beginning, protocol in SOURCES.items():
        if source.startswith(beginning):
            return f"Published in {source}: {protocol}."
    return f"Published in {source}: protocol not known."


def _rank(source: str) -> int:
    for rank, beginning in enumerate(SOURCES):
        if source.startswith(beginning):
            return rank
    return len(SOURCES)


def _averages_the_same(job: JobResult) -> bool:
    accuracies = [name for name in job.metrics.get("pruned", {}) if name.startswith("accuracy/")]
    tasks = {name.removeprefix("accuracy/") for name in accuracies}
    return tasks - {"average"} == AVERAGED


def _same(ratio: float, other: float | str) -> bool:
    return isinstance(other, float | int) and math.isclose(ratio, other, abs_tol=1e-6)


def _plain(name: str) -> str:
    """Return letters and digits alone, so that spellings of a model's name agree."""
    return re.sub(r"[^a-z0-9]", "", name.lower())
