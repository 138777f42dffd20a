"""What to say about a key that no configuration has: the nearest known key, or where to write it instead.

In: a key's path and the configuration. Out: one line, or a refusal.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

from omegaconf import DictConfig, OmegaConf

from heapr.errors import ConfigError
from heapr.words import did_you_mean, unknown_key

MOST_SUGGESTIONS = 3  # keys of the same name in other places
USED_WITH = {  # groups whose options are chosen inside other groups
    "corpus": "calibration=<name> to calibrate on one, evaluation/corpora=[<name>,...] to measure on some",
    "calibration/parts": "calibration=mixture 'calibration/parts@calibration.corpus.parts=[<name>,...]'",
    "launcher": "-m hydra/launcher=<name>; launcher=<name> is for sweep.py",
    "evaluation/evaluators": "'evaluation/evaluators@evaluation=[<name>,...]'",
}
EXPERIMENT = "experiment"

Tree = Mapping[str, Any]  # a configuration as nested mappings


def check_keys(config: DictConfig, schema: type) -> None:
    """Refuse keys that the schema does not have; Hydra takes them if they are written with a +.

    Args:
        config: composed.
        schema: a dataclass of fields and further dataclasses.

    Raises:
        ConfigError: there is such a key; the message suggests another one.
    """
    given = OmegaConf.to_container(config)
    assert isinstance(given, dict)
    by_name = {str(key): value for key, value in given.items()}
    known = _without_unknown(by_name, schema)
    for path in _keys_beyond(given, schema):
        raise ConfigError(explain_unknown_key(path, known))


def explain_unknown_key(path: str, known: Tree) -> str:
    """The message for a key that is not in a configuration, compared part by part."""
    if path == EXPERIMENT:
        return (
            "experiments of the folder experiments/ are run by sweep.py; write python sweep.py"
            " experiment=<name>"
        )
    if path in USED_WITH:
        return f"options of '{path}' are chosen where they are used; write {USED_WITH[path]}"
    node: Any = known
    parts = path.split(".")
    for number, part in enumerate(parts, start=1):
        if not isinstance(node, Mapping) or part not in node:
            here = list(node) if isinstance(node, Mapping) else []
            elsewhere = [key for key in _keys(known) if key.rpartition(".")[2] == parts[-1]]
            is_bare = len(parts) == 1  # pruning.ratio without its group looks like "calibration"
            if elsewhere and (is_bare or not did_you_mean(part, here)):
                return f"unknown key '{path}'; did you mean {' or '.join(elsewhere[:MOST_SUGGESTIONS])}?"
            return unknown_key(".".join(parts[:number]), here)
        node = node[part]
    return f"'{path}' is not a field that can be set; see --help"


def _keys_beyond(given: Mapping[Any, Any], schema: type, before: str = "") -> Iterator[str]:
    """Paths of the keys that a dataclass does not have."""
    types = get_type_hints(schema)
    names = {field.name for field in fields(schema)}
    for key, value in given.items():
        if key not in names:
            yield f"{before}{key}"
        elif is_dataclass(types[key]) and isinstance(value, Mapping):
            yield from _keys_beyond(value, types[key], f"{before}{key}.")


def _without_unknown(given: Tree, schema: type) -> dict[str, Any]:
    """The configuration with the keys of the schema alone."""
    types = get_type_hints(schema)
    known: dict[str, Any] = {}
    for field in fields(schema):
        value = given.get(field.name)
        if is_dataclass(types[field.name]) and isinstance(value, Mapping):
            value = _without_unknown(value, types[field.name])
        known[field.name] = value
    return known


def _keys(node: Tree, before: str = "") -> Iterator[str]:
    """Every key of a configuration, with the path to it."""
    for key, value in node.items():
        path = f"{before}{key}"
        yield path
        if isinstance(value, Mapping):
            yield from _keys(value, f"{path}.")
