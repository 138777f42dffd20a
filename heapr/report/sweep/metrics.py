"""Metrics by their contract names: where a summary holds them, which way is better, how they are printed.

In: jobs. Out: numbers and text.
"""

from __future__ import annotations

from typing import NamedTuple

from heapr.report.sweep.results import (
    JobResult,
    Jobs,
    finished,
    pruning_peak_memory_bytes,
    pruning_time_ratio,
    stage_cost,
)

LOWER, HIGHER = -1, 1


class Kind(NamedTuple):
    """What metrics of one kind have in common.

    Attributes:
        quantity: its name for a reader.
        better: `LOWER`, `HIGHER`, or 0 if neither is; tables then show it only on request.
        unit: in which it is printed.
        decimals: with which it is printed.
    """

    quantity: str
    better: int
    unit: str
    decimals: int


ARROWS = {LOWER: "↓", HIGHER: "↑", 0: ""}
LABELS = {
    "wikitext2": "WikiText-2",
    "ptb": "PTB",
    "c4": "C4",
    "dense": "unpruned (heapr's loop)",  # contestants of heapr/evaluation/throughput.py
    "pruned": "pruned (heapr's loop)",
    "dense_default": "unpruned (transformers' default)",
    "pruned_default": "pruned (transformers' default)",
}
SIZE_LABELS = {
    "flops_removed_ratio": "FLOPs saved",
    "flops_routed_removed_ratio": "experts' FLOPs saved",
    "parameters_removed_ratio": "parameters removed",
    "parameters_active_removed_ratio": "active parameters removed",
    "atomic_experts_removed_ratio": "atomic experts removed",
    "bytes_removed_ratio": "bytes saved",
}
COSTS = {"seconds": "time", "peak_memory_bytes": "peak memory"}
# By the first part of a name.
KINDS = {
    "perplexity": Kind("perplexity", LOWER, "", 2),
    "accuracy": Kind("accuracy", HIGHER, "%", 2),
    "accuracy_norm": Kind("normalised accuracy", HIGHER, "%", 2),
    "kl_to_dense": Kind("KL to unpruned", LOWER, "nats", 4),
    "top1_agreement": Kind("top-1 agreement", HIGHER, "%", 1),
    "greedy_agreement": Kind("greedy agreement", HIGHER, "%", 1),
    "loop_rate_greedy": Kind("greedy loop rate", LOWER, "%", 1),
    "loop_rate_sampled": Kind("sampled loop rate", LOWER, "%", 1),
    # Real text is neither as short nor as uniform as possible, and the reverse is no better.
    "distinct_ngrams_greedy": Kind("distinct 3-grams, greedy", 0, "%", 1),
    "distinct_ngrams_sampled": Kind("distinct 3-grams, sampled", 0, "%", 1),
    "length_greedy": Kind("greedy length", 0, "tokens", 1),
    "length_sampled": Kind("sampled length", 0, "tokens", 1),
    "truth": Kind("correlation", HIGHER, "", 3),
    "prefill_tokens_per_second": Kind("prefill tokens per second", HIGHER, "", 0),
    "decode_tokens_per_second": Kind("decode tokens per second", HIGHER, "", 0),
    "relative": Kind("share of increase", LOWER, "", 2),
    "pruning_time_ratio": Kind("pruning time, in calibrations", LOWER, "", 1),
    "pruning_peak_memory_bytes": Kind("pruning peak memory", LOWER, "GiB", 2),
    "calibration_seconds": Kind("calibration time", LOWER, "s", 2),
    "calibration_speedup": Kind("calibration speed-up", HIGHER, "", 2),
    "calibration_state_bytes": Kind("calibration state", LOWER, "MiB", 2),
    "calibration_peak_memory_bytes": Kind("calibration peak memory", LOWER, "MiB", 1),
}
SCALES = {"%": 100.0, "MiB": 2.0**-20, "GiB": 2.0**-30}  # from our unit to the printed one
UNASKED = {"accuracy_norm"}  # shown only on request
PRUNING_COSTS = {
    "pruning_time_ratio": pruning_time_ratio,
    "pruning_peak_memory_bytes": pruning_peak_memory_bytes,
}
# Metrics that pruning makes worse than the dense model's.
COMPARED = {"perplexity", "accuracy", "accuracy_norm", "kl_to_dense", "top1_agreement"}
# The dense model compared with itself.
OF_THE_DENSE = {"kl_to_dense": 0.0, "top1_agreement": 1.0}
# Metrics of a run, or of both models together: the unpruned model has no number of its own.
OF_A_PAIR = {
    "stages", "truth", "kl_to_dense", "top1_agreement", "greedy_agreement", *PRUNING_COSTS,
    "calibration_seconds", "calibration_speedup", "calibration_state_bytes", "calibration_peak_memory_bytes",
}  # fmt: skip


def value(job: JobResult, name: str, *, dense: bool = False) -> float | None:
    """Return a metric of the pruned or the dense model; None if it was not measured.

    Args:
        job: whose metric to return.
        name: as in summary.json; a size is `size/<name>`, the cost of a stage `stages/<stage>/seconds` or
            `stages/<stage>/peak_memory_bytes`, and the cost of the whole plan `pruning_time_ratio` or
            `pruning_peak_memory_bytes`.
        dense: whether to return the dense model's.
    """
    metrics = job.metrics
    if not metrics:
        return None
    group, _, rest = name.partition("/")
    if dense:
        if group == "size" and rest.endswith("removed_ratio") and rest in metrics["size"]:
            return 0.0
        return metrics["dense"].get(rest if group == "size" else name)
    if group == "size":
        return metrics["size"].get(rest)
    if group == "stages" or name in PRUNING_COSTS:
        return _cost(job, name)
    return metrics["pruned"].get(name, metrics["comparison"].get(name))


def _cost(job: JobResult, name: str) -> float | None:
    """Return the cost of a stage or of the whole plan: seconds, bytes, or a ratio of times."""
    if name in PRUNING_COSTS:
        return PRUNING_COSTS[name](job)
    stage, _, quantity = name.removeprefix("stages/").rpartition("/")
    return stage_cost(job, stage, quantity)


def share_of_increase(job: JobResult, baseline: JobResult, name: str) -> float | None:
    """Return (pruned - dense) / (baseline's pruned - dense): a job's damage as a share of the baseline's.

    None if one of the four was not measured, or the baseline did no damage.
    """
    ours = increase(job, name)
    theirs = increase(baseline, name)
    if ours is None or theirs is None or theirs <= 0:
        return None
    return ours / theirs


def increase(job: JobResult, name: str) -> float | None:
    """Return how much worse the pruned model is than the dense one; None if one was not measured.

    It is pruned - dense, or dense - pruned for a metric that is better when higher.
    """
    pruned = value(job, name)
    dense = dense_value(job, name)
    if pruned is None or dense is None:
        return None
    return -better(name) * (pruned - dense)


def dense_value(job: JobResult, name: str) -> float | None:
    """Return the dense model's metric: as measured, or as it is by definition, such as its own divergence."""
    measured = value(job, name, dense=True)
    return OF_THE_DENSE.get(name.partition("/")[0]) if measured is None else measured


def standard_error(job: JobResult, name: str, *, dense: bool = False) -> float | None:
    """Return the harness' standard error of an accuracy; None if there is none."""
    group, _, rest = name.partition("/")
    return value(job, f"{group}_stderr/{rest}", dense=dense)


def known(jobs: Jobs) -> list[str]:
    """Return the metrics that a table shows by default, in the order of the summaries.

    These are all that a job measured, except normalised accuracies and the average of a single task. The CSV
    has everything.
    """
    shown = KINDS.keys() - UNASKED
    names: dict[str, None] = {}
    for job in finished(jobs):
        for name in (*job.metrics["pruned"], *job.metrics["comparison"]):
            if name.partition("/")[0] in shown and better(name):
                names[name] = None
        for name in ("parameters_removed_ratio", "flops_removed_ratio", "flops_routed_removed_ratio"):
            if name in job.metrics["size"]:
                names[f"size/{name}"] = None
    accuracies = [name for name in names if name.startswith("accuracy/")]
    return [name for name in names if name != "accuracy/average" or len(accuracies) > 2]


def better(name: str) -> int:
    """Return the better direction: `LOWER`, `HIGHER`, or 0 if neither is better."""
    group, _, rest = name.partition("/")
    if group == "size":
        return HIGHER if rest.endswith("removed_ratio") else LOWER
    if group == "stages":
        return LOWER
    if name in {"truth/loss", "truth/num_tokens"}:
        return 0
    return KINDS[group].better if group in KINDS else 0


def unit(name: str) -> str:
    """Return the unit in which a metric is printed; empty if it has none."""
    group, _, rest = name.partition("/")
    if group in KINDS:
        return KINDS[group].unit
    if name.endswith("_ratio"):
        return "%"
    if group == "stages":
        return "s" if rest.endswith("seconds") else "GiB"
    return ""


def label(name: str) -> str:
    """Return a metric's name for a reader, without unit and direction."""
    group, _, rest = name.partition("/")
    in_words = rest.replace("_", " ")
    if group == "size":
        return SIZE_LABELS.get(rest, in_words)
    if group == "stages":
        stage, _, quantity = rest.rpartition("/")
        return f"{stage} {COSTS.get(quantity, quantity)}"
    if group == "relative":
        return f"{label(rest)}, {KINDS[group].quantity}"
    quantity = KINDS[group].quantity if group in KINDS else group.replace("_", " ")
    where = LABELS.get(rest, in_words)
    return f"{where} {quantity}".strip()


def axis_label(name: str) -> str:
    """Return a metric's name with its unit."""
    return f"{label(name)} ({unit(name)})" if unit(name) else label(name)


def column_label(name: str) -> str:
    """Return a metric's name with its unit and the direction that is better."""
    return f"{axis_label(name)}\N{NO-BREAK SPACE}{ARROWS[better(name)]}".strip()


def scaled(name: str, number: float) -> float:
    """Return a number in the unit in which it is printed."""
    return number * SCALES.get(unit(name), 1.0)


def text(name: str, number: float) -> str:
    """Return a number as it is printed: in its unit, which is left out, and with a true minus sign."""
    return printed(name, scaled(name, number))


def printed(name: str, number: float) -> str:
    """Return what `text` returns, for a number that is in its printed unit already."""
    is_known = name.partition("/")[0] in {*KINDS, "size", "stages"}
    if not is_known and not float(number).is_integer():
        return f"{number:.3g}".replace("-", "−")
    return f"{number:,.{_decimals(name, number)}f}".replace("-", "−")


def signed(name: str, number: float, beside: float) -> str:
    """Return a difference as it is printed, with as many decimals as the number beside it."""
    decimals = _decimals(name, scaled(name, beside))
    return f"{scaled(name, number):+,.{decimals}f}".replace("-", "−")


def _decimals(name: str, number: float) -> int:
    """Return how many decimals a number has in print; large perplexities and shares have fewer."""
    group = name.partition("/")[0]
    if group == "stages":
        return 2
    if group not in KINDS:
        return 1 if name.endswith("_ratio") else 0
    decimals = KINDS[group].decimals
    if group not in {"perplexity", "relative"}:
        return decimals
    # Each digit before the point, from the third on, costs a decimal.
    num_digits = len(str(int(abs(number))))
    return max(0, decimals - max(0, num_digits - 2))
