"""What tells jobs apart: model, ratio, criterion, scope, seed, and any field of the configuration by its
dotted path.

In: jobs. Out: values for tables and figures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

import yaml

from heapr.report.sweep.results import JobResult
from heapr.words import class_name, option_name

UNKNOWN = "—"
PATHS = {  # field of the configuration behind a factor's name
    "ratio": "pruning.ratio",
    "scope": "pruning.scope",
    "form": "pruning.form",
    "width_multiple": "pruning.width_multiple",
    "num_samples": "calibration.num_samples",
    "sequence_length": "calibration.sequence_length",
    "seed": "calibration.seed",
    "dtype": "model.dtype",
}
# Option that names a factor.
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
RESULTLESS = {"paths", "runtime", "tracking", "evaluation", "dry_run"}  # groups that change no pruned model
NAMES = ("model", "criterion", "corpus", *PATHS)
METHOD = "method"  # the criterion and what goes beyond the paper, in words
METHOD_PATHS = ("score", "pruning.scope", "pruning.rounds", "pruning.repair")


def factor(job: JobResult, name: str) -> Any:
    """Value of a factor of a job; `UNKNOWN` if a failed job left no trace of it.

    Args:
        name: one of `NAMES`, `METHOD`, or a dotted path of the configuration.
    """
    if name == METHOD:
        return _method(job)
    config = job.config
    if name in {"criterion", "corpus"}:
        chosen = _chosen(job.overrides, GROUPS[name])
        if chosen is not None:
            return chosen
    if config:
        found = _from_config(config, name)
        return found if found is not None else UNKNOWN
    return _from_overrides(job.overrides, name)


def is_factor(name: str) -> bool:
    return name in {*NAMES, METHOD} or "." in name


def paths_of(name: str) -> tuple[str, ...]:
    """Fields and groups of the configuration that a factor speaks for."""
    groups = {
        METHOD: METHOD_PATHS,
        "model": ("model",),
        "criterion": ("score",),
        "corpus": ("calibration.corpus",),
    }
    return groups.get(name, (PATHS.get(name, name),))


def header(name: str) -> str:
    return HEADERS.get(name, name.rpartition(".")[2].replace("_", " "))


def show(name: str, value: Any) -> str:
    """A factor's value as text."""
    if name == "ratio" and isinstance(value, float | int):
        return f"{100 * value:.4g} %"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def varying(jobs: Sequence[JobResult], names: Sequence[str]) -> list[str]:
    """Those factors that have more than one known value."""
    return [name for name in names if len({str(factor(job, name)) for job in jobs} - {UNKNOWN}) > 1]


def telling_apart(jobs: Sequence[JobResult], names: Sequence[str], average_over: str | None) -> list[str]:
    """The factors to add to some, so that jobs that are equal in all of them are those that are averaged: as
    few as it takes."""
    paths = [
        path
        for path in differing(jobs)
        if path.split(".")[0] not in RESULTLESS and path not in PATHS.values()
    ]
    added: list[str] = []
    for candidate in [*varying(jobs, NAMES), *paths]:
        groups: dict[tuple[str, ...], list[JobResult]] = {}
        for job in jobs:
            groups.setdefault(tuple(str(factor(job, name)) for name in [*names, *added]), []).append(job)
        is_averaged = (
            average_over is not None and candidate.rpartition(".")[2] == average_over.rpartition(".")[2]
        )
        if not is_averaged and any(varying(members, [candidate]) for members in groups.values()):
            added.append(candidate)
    return added


def describe(job: JobResult, names: Sequence[str]) -> str:
    """A job in words: `heapr global 25 % removed`."""
    return " ".join(show(name, factor(job, name)) + (" removed" if name == "ratio" else "") for name in names)


def selected(jobs: Sequence[JobResult], where: Mapping[str, Any]) -> list[JobResult]:
    """The jobs whose factors have the wanted values (one, or one of a list)."""

    def fits(job: JobResult, name: str, wanted: Any) -> bool:
        value = factor(job, name)
        return value in wanted if isinstance(wanted, list) else bool(value == wanted)

    return [job for job in jobs if all(fits(job, name, wanted) for name, wanted in where.items())]


def model_names(job: JobResult) -> list[str]:
    """What a job's model may be called elsewhere: its name, and the last part of its path."""
    model = job.config.get("model", {})
    return [str(model.get("name", "")), PurePosixPath(str(model.get("path", ""))).name]


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested fields under dotted paths."""
    fields: dict[str, Any] = {}
    for name, value in config.items():
        fields |= (
            flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + str(name): value}
        )
    return fields


def differing(jobs: Sequence[JobResult]) -> list[str]:
    """Dotted paths of the configuration that known configurations disagree about."""
    configs = [flat(job.config) for job in jobs if job.config]
    paths = dict.fromkeys(path for config in configs for path in config)
    return [path for path in paths if any(config.get(path) != configs[0].get(path) for config in configs)]


def in_order(value: Any) -> tuple[bool, float, str]:
    """Numbers by size, then text in its own order."""
    is_number = isinstance(value, int | float)
    return (not is_number, float(value) if is_number else 0.0, "" if is_number else str(value))


def _from_config(config: Mapping[str, Any], name: str) -> Any:
    if name == "model":
        model = config["model"]
        return PurePosixPath(str(model["path"])).name if model["name"] == "hf" else model["name"]
    if name == "criterion":
        return option_name(config["score"]["_target_"])
    if name == "corpus":
        return class_name(config["calibration"]["corpus"]["_target_"]).lower()
    return flat(config).get(PATHS.get(name, name))


def _method(job: JobResult) -> Any:
    """`fisher + joint repair, 4 rounds`; a recipe's name where nothing else is known."""
    config = job.config
    if not config:
        return _method_from_overrides(job.overrides)
    pruning = config.get("pruning", {})
    repair = "" if not pruning.get("repair") else _repair_name(pruning["repair"])
    return _method_text(
        str(factor(job, "criterion")),
        repair,
        str(pruning.get("rounds", 1)),
        str(pruning.get("scope", "global")),
    )


def _method_from_overrides(overrides: Sequence[str]) -> str:
    found = [_chosen(overrides, key) for key in ("recipe", "score")]
    base = ", ".join(name for name in found if name is not None)
    repair = _chosen(overrides, "pruning/repair") or ""
    if repair == "none":
        base, repair = f"{base} without repair" if found[0] else base, ""  # a recipe may have one
    scope = _chosen(overrides, "pruning.scope") or _chosen(overrides, "pruning") or "global"
    return (
        _method_text(
            base, f"{repair} repair" if repair else "", _chosen(overrides, "pruning.rounds") or "1", scope
        )
        if base
        else UNKNOWN
    )


def _method_text(base: str, repair: str, rounds: str, scope: str) -> str:
    text = f"{base} + {repair}" if repair else base
    text += f", {rounds} rounds" if rounds != "1" else ""
    return f"{text} ({scope})" if scope != "global" else text


def _repair_name(entry: Mapping[str, Any]) -> str:
    """`JointRepair` is `joint repair`; `full repair` where it moves the rows of W_gate and W_up too, `stream
    repair` where it also brings the residual stream back."""
    if entry.get("target") == "residual_stream":
        return "stream repair" if entry.get("refits", 0) > 0 else "joint stream repair"
    return "full repair" if entry.get("refits", 0) > 0 else option_name(entry["_target_"], " ")


def _from_overrides(overrides: Sequence[str], name: str) -> Any:
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
    """What the last override of a key says."""
    values = [
        override.partition("=")[2] for override in overrides if override.lstrip("+").partition("=")[0] == key
    ]
    return values[-1].strip("'\"") if values else None
