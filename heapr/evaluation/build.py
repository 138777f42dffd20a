"""From the evaluation group's configuration to evaluators."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from heapr.calibration.corpora import Corpus
from heapr.errors import ConfigError
from heapr.evaluation.evaluator import Evaluator
from heapr.schema import build, takes


def build_evaluators(evaluation: Mapping[str, Any]) -> list[Evaluator]:
    """Every entry but `corpora` is an evaluator; one that takes a corpus is built once for each.

    Raises:
        ConfigError: a misspelt key, a bad corpus, or two corpora of one name.
    """
    corpora = [build(entry, f"evaluation.corpora.{name}") for name, entry in (evaluation.get("corpora") or {}).items()]
    _check_names(corpora)
    evaluators: list[Evaluator] = []
    for name, entry in evaluation.items():
        if name == "corpora" or entry is None:
            continue
        where = f"evaluation.{name}"
        if takes(entry, "corpus"):
            evaluators += [build(entry, where, corpus=corpus) for corpus in corpora]
        else:
            evaluators.append(build(entry, where))
    return evaluators


def _check_names(corpora: list[Corpus]) -> None:
    names = [corpus.name for corpus in corpora]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"evaluation.corpora holds two corpora named '{name}'; their metrics would overwrite each other, keep one")
