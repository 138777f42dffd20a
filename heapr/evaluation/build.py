"""Build measurements from the configuration of the evaluation group."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from heapr.errors import ConfigError
from heapr.evaluation.measurement import Measurement, Need
from heapr.plugins import build, plug_in
from heapr.text.corpora import Corpus


def build_measurements(evaluation: Mapping[str, Any]) -> list[Measurement]:
    """Build a measurement from every entry but `corpora`.

    Measurements that need a corpus or a task are built once for each.

    Args:
        evaluation: the group's configuration.

    Raises:
        ConfigError: a misspelt key, a bad corpus, an entry that is not a measurement, or two measurements of
            the same name.
    """
    corpora = build_corpora(evaluation)
    measurements: list[Measurement] = []
    for name, entry in evaluation.items():
        if name != "corpora" and entry is not None:
            measurements += _build_each(entry, f"evaluation.{name}", corpora)
    numbers = Counter(measurement.name for measurement in measurements)
    for name, number in numbers.items():
        if number > 1:
            raise ConfigError(
                f"evaluation measures '{name}' {number} times, and one would overwrite the other; keep one, "
                "or give a corpus another name"
            )
    return measurements


def build_corpora(evaluation: Mapping[str, Any]) -> list[Corpus]:
    """Build the corpora of `evaluation.corpora`.

    Raises:
        ConfigError: an entry cannot be built, or is not a corpus.
    """
    corpora = []
    entries = evaluation.get("corpora", {})
    if not isinstance(entries, Mapping):
        raise ConfigError(
            f"evaluation.corpora={'null' if entries is None else entries} holds no corpora; choose some with"
            " evaluation/corpora=[pydocs], or none with evaluation/corpora=[]"
        )
    for name, entry in entries.items():
        where = f"evaluation.corpora.{name}"
        corpus = build(entry, where)
        if not isinstance(corpus, Corpus):
            raise ConfigError(
                f"{where} is a {type(corpus).__name__}, which cannot be measured on; list its corpora one by"
                " one"
            )
        corpora.append(corpus)
    return corpora


def _build_each(entry: Mapping[str, Any], where: str, corpora: Sequence[Corpus]) -> list[Measurement]:
    """Build one entry's measurements."""
    needs: frozenset[Need] = getattr(plug_in(entry, where), "needs", frozenset())
    if Need.CORPUS in needs:
        built = [build(entry, where, corpus=corpus) for corpus in corpora]
    elif Need.TASK in needs:
        shared = {key: value for key, value in entry.items() if key != "tasks"}
        built = [build(shared, where, task=task) for task in _tasks(entry, where)]
    else:
        built = [build(entry, where)]
    for measurement in built:
        if not isinstance(measurement, Measurement):
            target = entry["_target_"]
            raise ConfigError(f"{where}._target_='{target}' is not a measurement; see docs/adding.md")
    return built


def _tasks(entry: Mapping[str, Any], where: str) -> list[str]:
    tasks = entry.get("tasks")
    if not isinstance(tasks, list) or not tasks or not all(isinstance(task, str) for task in tasks):
        raise ConfigError(
            f"{where}.tasks={tasks} is not a list of names; give one or more, for example"
            f" {where}.tasks=[piqa,arc_easy]"
        )
    return tasks
