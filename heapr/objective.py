"""The number that a run returns to a sweeper: the metric that `objective` names.

In: the name, the measurements of an experiment, the metrics of its run. Out: a number, or a refusal before
any work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from heapr.errors import ConfigError
from heapr.evaluation.measurement import Measurement
from heapr.evaluation.zero_shot import AVERAGE, PREFIX
from heapr.types import Metrics
from heapr.words import did_you_mean

GROUPS = ("pruned", "size", "comparison")  # of a run's metrics; those of the dense model do not depend on it
ALWAYS = "atomic_experts_removed_ratio"


def known_objectives(measurements: Sequence[Measurement]) -> list[str]:
    """Names of metrics that a run can return, as far as they are known before anything is measured."""
    names = {ALWAYS: None}
    for measurement in measurements:
        names |= dict.fromkeys(getattr(measurement, "objectives", ()))
        if measurement.name.startswith(PREFIX):
            names[AVERAGE] = None
    return list(names)


def check_objective(objective: str | None, measurements: Sequence[Measurement]) -> None:
    """Refuse an objective that no measurement gives.

    Raises:
        ConfigError: it is unknown.
    """
    known = known_objectives(measurements)
    if objective is None or objective in known:
        return
    hint = did_you_mean(objective, known)
    raise ConfigError(
        f"objective={objective} is not measured here; {hint}with this evaluation, a run can return:"
        f" {', '.join(known)}"
    )


def objective_value(objective: str | None, metrics: Mapping[str, Metrics]) -> float | None:
    """The number that a run returns; None without an objective.

    Args:
        objective: the name of a metric.
        metrics: of the run, by group.

    Raises:
        ConfigError: the run has no such metric, for example the accuracy of a task that measures something
            else.
    """
    if objective is None:
        return None
    found: Metrics = {}
    for group in GROUPS:
        found |= metrics[group]
    if objective not in found:
        raise ConfigError(
            f"objective={objective} was not measured: the run ended without it; it has {', '.join(found)}"
        )
    return float(found[objective])
