"""Metrics by their contract names: where a summary holds them, which way is better, how they are printed.

In: jobs. Out: numbers and text.
"""

from __future__ import annotations

from collections.abc import Sequence

from heapr.report.sweep.results import (
    JobResult,
    finished,
    pruning_peak_memory_bytes,
    pruning_time_ratio,
    stage_cost,
)

LOWER, HIGHER = -1, 1
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
KINDS = {  # first part of a name: its quantity, which way is better, unit, decimals
    "perplexity": ("perplexity", LOWER, "", 2),
    "accuracy": ("accuracy", HIGHER, "%", 2),
    "accuracy_norm": ("normalised accuracy", HIGHER, "%", 2),
    "kl_to_dense": ("KL to unpruned", LOWER, "nats", 4),
    "top1_agreement": ("top-1 agreement", HIGHER, "%", 1),
    "truth": ("correlation", HIGHER, "", 3),
    "prefill_tokens_per_second": ("prefill tokens per second", HIGHER, "", 0),
    "decode_tokens_per_second": ("decode tokens per second", HIGHER, "", 0),
    "relative": ("share of increase", LOWER, "", 2),
    "pruning_time_ratio": ("pruning time, in calibrations", LOWER, "", 1),
    "pruning_peak_memory_bytes": ("pruning peak memory", LOWER, "GiB", 2),
    "calibration_seconds": ("calibration time", LOWER, "s", 2),
    "calibration_speedup": ("calibration speed-up", HIGHER, "", 2),
    "calibration_state_bytes": ("calibration state", LOWER, "MiB", 2),
    "calibration_peak_memory_bytes": ("calibration peak memory", LOWER, "MiB", 1),
}
UNASKED = {"accuracy_norm"}
PRUNING_COSTS = {
    "pruning_time_ratio": pruning_time_ratio,
    "pruning_peak_memory_bytes": pruning_peak_memory_bytes,
}
# Of which pruning makes the dense model's worse.
COMPARED = {
    "perplexity",
    "accuracy",
    "accuracy_norm",
    "kl_to_dense",
    "top1_agreement",
}
OF_THE_DENSE = {"kl_to_dense": 0.0, "top1_agreement": 1.0}  # by definition
# Of a run or of both models together, so that the unpruned model has no such number of its own
OF_A_PAIR = {
    "stages", "truth", "kl_to_dense", "top1_agreement", *PRUNING_COSTS,
    "calibration_seconds", "calibration_speedup", "calibration_state_bytes", "calibration_peak_memory_bytes",
}  # fmt: skip


def value(job: JobResult, name: str, *, dense: bool = False) -> float | None:
    """A metric of the pruned or the dense model; none if it was not measured.

    Args:
        name: as in summary.json; sizes as `size/<name>`, cost of a stage as `stages/<stage>/seconds` or
            `.../peak_memory_bytes`, of all that made the plan as `pruning_time_ratio` and
            `pruning_peak_memory_bytes`.
    """
    metrics = job.metrics
    if not metrics:
        return None
    group, _, rest = name.partition("/")
    if dense:
        if group == "size":
            return (
                0.0
                if rest.endswith("removed_ratio") and rest in metrics["size"]
                else metrics["dense"].get(rest)
            )
        return metrics["dense"].get(name)
    if group == "size":
        return metrics["size"].get(rest)
    if group == "stages" or name in PRUNING_COSTS:
        stage, _, quantity = rest.rpartition("/")
        return PRUNING_COSTS[name](job) if name in PRUNING_COSTS else stage_cost(job, stage, quantity)
    return metrics["pruned"].get(name, metrics["comparison"].get(name))


def share_of_increase(job: JobResult, baseline: JobResult, name: str) -> float | None:
    """(pruned - dense) / (baseline's pruned - dense): how much of a baseline's damage a job does.

    None where one of the four was not measured, or the baseline did no damage.
    """
    ours, theirs = increase(job, name), increase(baseline, name)
    return None if ours is None or theirs is None or theirs <= 0 else ours / theirs


def increase(job: JobResult, name: str) -> float | None:
    """How much worse than the dense model the pruned one is: of an accuracy, how much it lost. None if one of
    them was not measured."""
    pruned, dense = value(job, name), value(job, name, dense=True)
    dense = OF_THE_DENSE.get(name.partition("/")[0]) if dense is None else dense
    return None if pruned is None or dense is None else -better(name) * (pruned - dense)


def standard_error(job: JobResult, name: str, *, dense: bool = False) -> float | None:
    """Of an accuracy: the harness' standard error."""
    group, _, rest = name.partition("/")
    return value(job, f"{group}_stderr/{rest}", dense=dense)


def known(jobs: Sequence[JobResult]) -> list[str]:
    """What a table shows unless it is told otherwise, of what any job measured, in the order in which
    summaries hold it.

    Left out: normalised accuracies, and the average of a single task. The CSV holds everything.
    """
    names: dict[str, None] = {}
    for job in finished(jobs):
        measured = [*job.metrics["pruned"], *job.metrics["comparison"]]
        names |= dict.fromkeys(
            name for name in measured if name.partition("/")[0] in KINDS.keys() - UNASKED and better(name)
        )
        names |= {
            f"size/{name}": None
            for name in ("parameters_removed_ratio", "flops_removed_ratio")
            if name in job.metrics["size"]
        }
    accuracies = [name for name in names if name.startswith("accuracy/")]
    return [name for name in names if name != "accuracy/average" or len(accuracies) > 2]


def better(name: str) -> int:
    """`LOWER`, `HIGHER`, or 0 where neither is better."""
    group, _, rest = name.partition("/")
    if group == "size":
        return HIGHER if rest.endswith("removed_ratio") else LOWER
    if group == "stages":
        return LOWER
    if name in {"truth/loss", "truth/num_tokens"}:
        return 0
    return KINDS[group][1] if group in KINDS else 0


def unit(name: str) -> str:
    group, _, rest = name.partition("/")
    if group in KINDS:
        return KINDS[group][2]
    if name.endswith("_ratio"):
        return "%"
    if group == "stages":
        return "s" if rest.endswith("seconds") else "GiB"
    return ""


def label(name: str) -> str:
    """A metric's name for a reader, without unit and direction."""
    group, _, rest = name.partition("/")
    if group == "size":
        return SIZE_LABELS.get(rest, rest.replace("_", " "))
    if group == "stages":
        stage, _, quantity = rest.rpartition("/")
        return f"{stage} {COSTS.get(quantity, quantity)}"
    if group == "relative":
        return f"{label(rest)}, {KINDS[group][0]}"
    quantity = KINDS[group][0] if group in KINDS else group.replace("_", " ")
    return f"{LABELS.get(rest, rest.replace('_', ' '))} {quantity}".strip()


def axis_label(name: str) -> str:
    """A metric's name with its unit."""
    return f"{label(name)} ({unit(name)})" if unit(name) else label(name)


def column_label(name: str) -> str:
    """A metric's name with its unit and the direction that is better."""
    return f"{axis_label(name)}\N{NO-BREAK SPACE}{ARROWS[better(name)]}".strip()


def scaled(name: str, number: float) -> float:
    """A number in the unit that it is printed in."""
    return number * {"%": 100.0, "MiB": 2.0**-20, "GiB": 2.0**-30}.get(unit(name), 1.0)


def text(name: str, number: float) -> str:
    """A number as it is printed, without its unit; a minus sign is a minus sign."""
    return printed(name, scaled(name, number))


def printed(name: str, number: float) -> str:
    """As `text`, of a number that has its unit already."""
    if name.partition("/")[0] not in {*KINDS, "size", "stages"} and not float(number).is_integer():
        return f"{number:.3g}".replace("-", "−")
    return f"{number:,.{_decimals(name, number)}f}".replace("-", "−")


def signed(name: str, number: float, beside: float) -> str:
    """A difference as it is printed, as fine as the number it stands beside."""
    decimals = _decimals(name, scaled(name, beside))
    return f"{scaled(name, number):+,.{decimals}f}".replace("-", "−")


def _decimals(name: str, number: float) -> int:
    group = name.partition("/")[0]
    if group == "stages":
        return 2
    if group not in KINDS:
        return 1 if name.endswith("_ratio") else 0
    decimals = KINDS[group][3]
    return (
        max(0, decimals - max(0, len(str(int(abs(number)))) - 2))
        if group in {"perplexity", "relative"}
        else decimals
    )
