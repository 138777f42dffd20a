"""What tells jobs apart: model, ratio, criterion, seed, or any field of the configuration by its dotted path.

In: jobs. Out: values for tables and figures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

import yaml

from heapr.report.sweep.results import JobResult, Jobs
from heapr.words import class_name, option_name

UNKNOWN = "—"
# From a factor's name to its field of the configuration.
PATHS = {
    "ratio": "pruning.ratio",
    "scope": "pruning.scope",
    "form": "pruning.form",
    "width_multiple": "pruning.width_multiple",
    "num_samples": "calibration.num_samples",
    "sequence_length": "calibration.sequence_length",
    "seed": "calibration.seed",
    "dtype": "model.dtype",
}
# From a factor's name to the group of options that contains its value.
GROUPS = {
    "model": "model",
    "criterion": "score",
    "corpus": "calibration",
    "scope": "pruning",
}
HEADERS = {
    "ratio": "removed (asked)",
    "num_samples": "calibration sequences",
    "sequence_length": "sequence length",
    "corpus": "calibrated on",
}
# Groups that do not change the pruned model.
RESULTLESS = {"paths", "runtime", "tracking", "evaluation", "dry_run", "objective"}
NAMES = ("model", "criterion", "corpus", *PATHS)
RATIO = "ratio"
METHOD = "method"  # the criterion, and what goes beyond the paper, in words
METHOD_PATHS = ("score", "pruning.scope", "pruning.rounds", "pruning.repair")


def factor(job: JobResult, name: str) -> Any:
    """Return the value of a factor of a job; `UNKNOWN` if a failed job left no trace of it.

    Args:
        name: one of `NAMES`, `METHOD`, or a dotted path of the configuration.
    """
    if name == METHOD:
        return _method(job)
    if name in {"criterion", "corpus"}:
        chosen = _chosen(job.overrides, GROUPS[name])
        if chosen is not None:
            return chosen
    config = job.config
    if not config:
        return _from_overrides(job.overrides, name)
    found = _from_config(config, name)
    return UNKNOWN if found is None else found


def is_factor(name: str) -> bool:
    return name in {*NAMES, METHOD} or "." in name


def paths_of(name: str) -> tuple[str, ...]:
    """Return the fields and groups of the configuration that a factor stands for."""
    groups = {
        METHOD: METHOD_PATHS,
        "model": ("model",),
        "criterion": ("score",),
        "corpus": ("calibration.corpus",),
    }
    return groups.get(name, (PATHS.get(name, name),))


def header(name: str) -> str:
    """Return a factor's name for a reader."""
    return HEADERS.get(name, _last(name).replace("_", " "))


def show(name: str, value: Any) -> str:
    """Return a factor's value as text."""
    if name == "ratio" and isinstance(value, float | int):
        return f"{100 * value:.4g} %"
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    return f"{value:,}" if is_integer else str(value)


def varying(jobs: Jobs, names: Sequence[str]) -> list[str]:
    """Return the factors that have more than one known value."""
    found = []
    for name in names:
        values = {str(factor(job, name)) for job in jobs}
        if len(values - {UNKNOWN}) > 1:
            found.append(name)
    return found


def telling_apart(jobs: Jobs, names: Sequence[str], average_over: str | None) -> list[str]:
    """Return the factors to add to `names` until only jobs that are averaged agree in all of them.

    Args:
        jobs: to tell apart.
        names: factors that tell some of them apart.
        average_over: factor whose values are averaged; it is never added.

    Returns:
        As few factors as it takes, in their usual order, then fields of the configuration.
    """
    candidates = varying(jobs, NAMES)
    for path in differing(jobs):
        if path.split(".")[0] not in RESULTLESS and path not in PATHS.values():
            candidates.append(path)
    added: list[str] = []
    for candidate in candidates:
        is_averaged = average_over is not None and _last(candidate) == _last(average_over)
        if is_averaged:
            continue
        groups = by_values(jobs, [*names, *added])
        if any(varying(members, [candidate]) for members in groups.values()):
            added.append(candidate)
    return added


def what_differs(jobs: Jobs) -> list[str]:
    """Return the factors that differ between jobs, then the fields that differ where those agree."""
    names = varying(jobs, NAMES)
    further = telling_apart(jobs, names, None)
    measured = [path for path in differing(jobs) if path.split(".")[0] in RESULTLESS]
    return [*names, *further, *measured]


def by_values(jobs: Jobs, names: Sequence[str]) -> dict[tuple[str, ...], list[JobResult]]:
    """Group jobs by the values of some factors, in order of appearance."""
    groups: dict[tuple[str, ...], list[JobResult]] = {}
    for job in jobs:
        values = tuple(str(factor(job, name)) for name in names)
        groups.setdefault(values, []).append(job)
    return groups


def describe(job: JobResult, names: Sequence[str]) -> str:
    """Return a job in words: `heapr global 25 % removed`."""
    words = []
    for name in names:
        text = show(name, factor(job, name))
        words.append(f"{text} removed" if name == "ratio" else text)
    return " ".join(words)


def failure(job: JobResult) -> str:
    """Say in one line which job failed, and why."""
    what = " ".join(job.overrides) or describe(job, ["model", "criterion", "ratio"])
    reason = (job.error or "no reason known").strip().splitlines()[0]
    return f"Job {job.number} failed ({what}): {reason}"


def selected(jobs: Jobs, where: Mapping[str, Any]) -> list[JobResult]:
    """Return the jobs whose factors have the wanted values: a value, or one of a list."""
    chosen = list(jobs)
    for name, wanted in where.items():
        values = wanted if isinstance(wanted, list) else [wanted]
        chosen = [job for job in chosen if factor(job, name) in values]
    return chosen


def model_names(job: JobResult) -> list[str]:
    """Return what a job's model may be called elsewhere: its name, and the last part of its path."""
    model = job.config.get("model", {})
    return [str(model.get("name", "")), PurePosixPath(str(model.get("path", ""))).name]


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested fields under dotted paths."""
    fields: dict[str, Any] = {}
    for name, value in config.items():
        path = f"{prefix}{name}"
        if isinstance(value, Mapping):
            fields |= flat(value, f"{path}.")
        else:
            fields[path] = value
    return fields


def differing(jobs: Jobs) -> list[str]:
    """Return the dotted paths of fields that differ between the configurations that are known."""
    configs = [flat(config) for job in jobs if (config := job.config)]
    paths = dict.fromkeys(path for config in configs for path in config)
    found = []
    for path in paths:
        first = configs[0].get(path)
        if any(config.get(path) != first for config in configs):
            found.append(path)
    return found


def in_order(value: Any) -> tuple[bool, float, str]:
    """Return a key for sorting: numbers by size, then text alphabetically."""
    if isinstance(value, int | float):
        return (False, float(value), "")
    return (True, 0.0, str(value))


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _from_config(config: Mapping[str, Any], name: str) -> Any:
    """Return a factor of a resolved configuration; None if it has no such field."""
    if name == "model":
        model = config["model"]
        return PurePosixPath(str(model["path"])).name if model["name"] == "hf" else model["name"]
    if name == "criterion":
        return option_name(config["score"]["_target_"])
    if name == "corpus":
        return class_name(config["calibration"]["corpus"]["_target_"]).lower()
    return flat(config).get(PATHS.get(name, name))


def _method(job: JobResult) -> Any:
    """Return a job's method, such as `fisher + joint repair, 4 rounds`.

    It is a recipe's name if a job failed and only that is known.
    """
    config = job.config
    if not config:
        return _method_from_overrides(job.overrides)
    pruning = config.get("pruning", {})
    repair = pruning.get("repair")
    return _method_text(
        str(factor(job, "criterion")),
        repair=_repair_name(repair) if repair else "",
        rounds=str(pruning.get("rounds", 1)),
        scope=str(pruning.get("scope", "global")),
    )


def _method_from_overrides(overrides: Sequence[str]) -> str:
    """Return the method of a job without a configuration; `UNKNOWN` if its overrides do not say it."""
    recipe = _chosen(overrides, "recipe")
    score = _chosen(overrides, "score")
    base = ", ".join(name for name in (recipe, score) if name is not None)
    if not base:
        return UNKNOWN
    repair = _chosen(overrides, "pruning/repair")
    if repair == "none":
        repair = None
        if recipe:
            # Recipes may include a repair.
            base = f"{base} without repair"
    return _method_text(
        base,
        repair=f"{repair} repair" if repair else "",
        rounds=_chosen(overrides, "pruning.rounds") or "1",
        scope=_chosen(overrides, "pruning.scope") or _chosen(overrides, "pruning") or "global",
    )


def _method_text(base: str, *, repair: str, rounds: str, scope: str) -> str:
    text = base
    if repair:
        text += f" + {repair}"
    if rounds != "1":
        text += f", {rounds} rounds"
    if scope != "global":
        text += f" ({scope})"
    return text


def _repair_name(entry: Mapping[str, Any]) -> str:
    """Name a repair: `JointRepair` is `joint repair`.

    It is `full repair` if it refits the rows of W_gate and W_up too, and `stream repair` if it refits them so
    that the residual stream matches the unpruned model's.
    """
    has_refits = entry.get("refits", 0) > 0
    if entry.get("target") == "residual_stream":
        return "stream repair" if has_refits else "joint stream repair"
    return "full repair" if has_refits else option_name(entry["_target_"], " ")


def _from_overrides(overrides: Sequence[str], name: str) -> Any:
    """Return a factor of a job without a configuration, as far as its overrides say it."""
    path = _chosen(overrides, "model.path")
    if name == "model" and path is not None:
        return PurePosixPath(path).name
    value = _chosen(overrides, PATHS.get(name, name))
    if value is None and name in GROUPS:
        value = _chosen(overrides, GROUPS[name])
    if value is None:
        return UNKNOWN
    return yaml.safe_load(value)


def _chosen(overrides: Sequence[str], key: str) -> str | None:
    """Return the value in the last override of a key; None without one."""
    chosen = None
    for override in overrides:
        name, _, value = override.lstrip("+").partition("=")
        if name == key:
            chosen = value.strip("'\"")
    return chosen
