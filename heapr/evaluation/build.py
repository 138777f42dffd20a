"""From the evaluation group's configuration to evaluators."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch

from heapr.errors import ConfigError
from heapr.evaluation.evaluator import Comparison, Evaluator
from heapr.schema import build, plug_in
from heapr.text.corpora import Corpus


def build_evaluators(evaluation: Mapping[str, Any], device: torch.device) -> list[Evaluator | Comparison]:
    """Every entry but `corpora` is an evaluator; one that takes a corpus or a task is built once for each.

    Args:
        evaluation: the group's configuration.
        device: where the models will be, for evaluators that ask for it.

    Raises:
        ConfigError: a misspelt key, a bad corpus, something else than an evaluator, or two evaluators of one name.
    """
    corpora = [_corpus(entry, f"evaluation.corpora.{name}") for name, entry in evaluation.get("corpora", {}).items()]
    evaluators: list[Evaluator | Comparison] = []
    for name, entry in evaluation.items():
        if name == "corpora" or entry is None:
            continue
        where = f"evaluation.{name}"
        parameters = inspect.signature(plug_in(entry, where)).parameters
        injected = {"device": device} if "device" in parameters else {}
        if "corpus" in parameters:
            built = [build(entry, where, corpus=corpus, **injected) for corpus in corpora]
        elif "task" in parameters:
            shared = {key: value for key, value in entry.items() if key != "tasks"}
            built = [build(shared, where, task=task, **injected) for task in _tasks(entry, where)]
        else:
            built = [build(entry, where, **injected)]
        if not all(isinstance(evaluator, Evaluator | Comparison) for evaluator in built):
            raise ConfigError(f"{where}._target_='{entry['_target_']}' is neither an evaluator nor a comparison; see docs/adding.md")
        evaluators += built
    for name, number in Counter(evaluator.name for evaluator in evaluators).items():
        if number > 1:
            raise ConfigError(
                f"evaluation measures '{name}' {number} times; one would overwrite the other, keep one or give a corpus another name"
            )
    return evaluators


def _corpus(entry: Mapping[str, Any], where: str) -> Corpus:
    corpus = build(entry, where)
    if not isinstance(corpus, Corpus):
        raise ConfigError(f"{where} is a {type(corpus).__name__}, which is no corpus to measure on; name corpora one by one")
    return corpus


def _tasks(entry: Mapping[str, Any], where: str) -> list[str]:
    tasks = entry.get("tasks")
    if not isinstance(tasks, list) or not tasks or not all(isinstance(task, str) for task in tasks):
        raise ConfigError(f"{where}.tasks={tasks} is not a list of names; give one or more, for example {where}.tasks=[piqa,arc_easy]")
    return tasks
