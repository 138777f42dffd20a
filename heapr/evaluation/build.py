"""From the evaluation group's configuration to evaluators."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Mapping
from typing import Any

from heapr.errors import ConfigError
from heapr.evaluation.evaluator import Evaluator
from heapr.schema import build, plug_in


def build_evaluators(evaluation: Mapping[str, Any]) -> list[Evaluator]:
    """Every entry but `corpora` is an evaluator; one that takes a corpus or a task is built once for each.

    Raises:
        ConfigError: a misspelt key, a bad corpus, or two evaluators of one name.
    """
    corpora = [build(entry, f"evaluation.corpora.{name}") for name, entry in evaluation.get("corpora", {}).items()]
    evaluators: list[Evaluator] = []
    for name, entry in evaluation.items():
        if name == "corpora" or entry is None:
            continue
        where = f"evaluation.{name}"
        parameters = inspect.signature(plug_in(entry, where)).parameters
        if "corpus" in parameters:
            evaluators += [build(entry, where, corpus=corpus) for corpus in corpora]
        elif "task" in parameters:
            shared = {key: value for key, value in entry.items() if key != "tasks"}
            evaluators += [build(shared, where, task=task) for task in _tasks(entry, where)]
        else:
            evaluators.append(build(entry, where))
    for name, number in Counter(evaluator.name for evaluator in evaluators).items():
        if number > 1:
            raise ConfigError(
                f"evaluation measures '{name}' {number} times; one would overwrite the other, keep one or give a corpus another name"
            )
    return evaluators


def _tasks(entry: Mapping[str, Any], where: str) -> list[str]:
    tasks = entry.get("tasks")
    if not isinstance(tasks, list) or not tasks or not all(isinstance(task, str) for task in tasks):
        raise ConfigError(f"{where}.tasks={tasks} is not a list of names; give one or more, for example {where}.tasks=[piqa,arc_easy]")
    return tasks
