"""Says in one line what is wrong with a configuration that Hydra could not compose.

In: the error that Hydra or omegaconf raised, and the arguments of the command line. Out: what was given,
why it cannot be, and what to type instead.
"""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig
from yaml import YAMLError

from heapr.overrides import explain_comma, explain_launcher, explain_option, explain_override, options_of
from heapr.words import did_you_mean, first_line, unknown_key

# How messages of omegaconf and Hydra begin:
# An override sets a field of null, or all of them.
FIELD_OF_NOTHING = ("Unexpected type for root: NoneType", "'NoneType' object has no attribute 'get'")
OPTION_WITHOUT_NAME = "Config group override must be a string or a list"  # score=3
COMMA_OUTSIDE_SWEEP = "Ambiguous value for argument"  # a=1,2
UNKNOWN_PLUGIN = "Unknown plugin class"  # a launcher whose package is not installed
UNREADABLE_VALUE = "Error merging override"  # a value of the wrong type

OF_COMPOSITION = "hydra/_internal/config_loader_impl.py"  # where Hydra composes

MOST_SUGGESTIONS = 3  # keys of the same name in other places

USED_WITH = {  # groups whose options are chosen inside other groups
    "corpus": "calibration=<name> to calibrate on one, evaluation/corpora=[<name>,...] to measure on some",
    "calibration/parts": "calibration=mixture 'calibration/parts@calibration.corpus.parts=[<name>,...]'",
    "launcher": "-m hydra/launcher=<name>; launcher=<name> is for sweep.py",
    "evaluation/evaluators": "'evaluation/evaluators@evaluation=[<name>,...]'",
}


def explain_builtin(error: Exception, config_folder: Path | None) -> str | None:
    """The message for a mistake that Hydra answers with an error of Python; None for any other error."""
    text = str(error)
    if isinstance(error, YAMLError):
        return explain_yaml(error)
    if _is_raised_in(error, OF_COMPOSITION):
        reason = "it refers to itself" if isinstance(error, RecursionError) else first_line(error)
        if not text.startswith((OPTION_WITHOUT_NAME, UNKNOWN_PLUGIN, *FIELD_OF_NOTHING)):
            return f"a configuration file cannot be read: {reason}; correct it"
    if text.startswith(OPTION_WITHOUT_NAME) and config_folder is not None:
        return explain_option(sys.argv[1:], config_folder)
    if text.startswith(UNKNOWN_PLUGIN):
        return explain_launcher(text)
    if text.startswith(FIELD_OF_NOTHING) and _is_raised_in(error, OF_COMPOSITION):
        return (
            "an override sets a field of something that is null, such as pruning.repair.ridge; choose it"
            " first, for example pruning/repair=joint"
        )
    return None


def explain_yaml(error: YAMLError) -> str:
    """The message for a file that is not YAML."""
    reason = getattr(error, "problem", None) or first_line(error)
    mark = getattr(error, "problem_mark", None)
    where = "a configuration file" if mark is None else f"line {mark.line + 1} of '{mark.name}'"
    return f"{where} is not YAML: {reason}; correct it"


def _is_raised_in(error: Exception, file: str) -> bool:
    """Whether an error passed through a source file, given by the end of its path."""
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_code.co_filename.endswith(file) for frame, _ in frames)


def explain(error: Exception, config_folder: Path | None, overrides: Sequence[str]) -> str:
    """Hydra's message, or a better one if a key is misspelled or a value has the wrong type.

    Args:
        error: what Hydra raised when it composed the configuration.
        config_folder: used to look up known keys.
        overrides: arguments of the command line.
    """
    text = str(error).strip() or first_line(error.__cause__ or error.__context__ or error)
    if isinstance(error, OverrideParseException):
        return _explain_unparsed(error.override, text, overrides)
    if text.startswith(COMMA_OUTSIDE_SWEEP):
        quoted = text.splitlines()[0].removeprefix(COMMA_OUTSIDE_SWEEP).strip()
        return explain_comma(quoted[1:-1])
    match = re.match(r"Could not override '([^']+)'", text)
    if match and config_folder is not None:
        return _explain_unmatched(match[1], text, config_folder, overrides)
    match = re.search(r"Could not (?:find|load) '([^']+)'", text)
    if match and config_folder is not None and (config_folder / match[1]).parent.is_dir():
        return _unknown_option(match[1], config_folder)
    if text.startswith(UNREADABLE_VALUE) and error.__cause__ is not None:
        return _explain_unreadable(text, first_line(error.__cause__), config_folder)
    return text


def _explain_unreadable(text: str, reason: str, config_folder: Path | None) -> str:
    """The message for a value of the wrong type, such as the name of an option for a field."""
    override = text.removeprefix(UNREADABLE_VALUE).removeprefix(" ")
    key, _, value = override.partition("=")
    group = key.replace(".", "/")
    if config_folder is not None and (config_folder / group).is_dir():
        return f"'{override}': options of a group are chosen with a slash; write {group}={value}"
    return f"{override}: {reason}; give a value of the field's type (heapr/schema.py)"


def _explain_unparsed(override: str, text: str, overrides: Sequence[str]) -> str:
    """The message for an override that Hydra cannot parse, or whose function, such as int(x), fails."""
    evaluated = [line for line in text.splitlines() if "while evaluating" in line]
    if evaluated:
        return f"argument '{override}': {evaluated[0]}"
    return explain_override(override, overrides)


def _explain_unmatched(path: str, text: str, config_folder: Path, overrides: Sequence[str]) -> str:
    """The message for a key that is not in the configuration, or a group that is used inside others."""
    if path in USED_WITH:
        return f"options of '{path}' are chosen where they are used; write {USED_WITH[path]}"
    is_unknown_key = "To append to your config" in text
    return _explain_unknown_key(path, config_folder, overrides) if is_unknown_key else text


def _unknown_option(path: str, config_folder: Path) -> str:
    """The message for a misspelled option of a group."""
    group, _, option = path.rpartition("/")
    known = options_of(group, config_folder)
    suggestion = did_you_mean(option, known)
    return f"unknown option '{path}'; {suggestion}known options of {group}: {', '.join(known)}"


def _explain_unknown_key(path: str, config_folder: Path, overrides: Sequence[str]) -> str:
    """The message for a misspelled key, compared part by part with the options that were chosen."""
    config = _compose_groups(overrides, config_folder)
    node = config
    parts = path.split(".")
    for number, part in enumerate(parts, start=1):
        if not isinstance(node, DictConfig) or part not in node:
            known = [str(key) for key in node] if isinstance(node, DictConfig) else []
            elsewhere = [key for key in _keys(config) if key.rpartition(".")[2] == parts[-1]]
            is_bare = len(parts) == 1  # pruning.ratio without its group looks like "calibration"
            if elsewhere and (is_bare or not did_you_mean(part, known)):
                return f"unknown key '{path}'; did you mean {' or '.join(elsewhere[:MOST_SUGGESTIONS])}?"
            return unknown_key(".".join(parts[:number]), known)
        node = node[part]
    return f"'{path}' is not a field that can be set; see --help"


def _compose_groups(overrides: Sequence[str], config_folder: Path) -> DictConfig:
    """The configuration with the first option chosen for each group, and no other override."""
    matches = [re.fullmatch(r"([a-z_/]+)=([a-z_0-9]+)(,.*)?", override) for override in overrides]
    choices = [f"{match[1]}={match[2]}" for match in matches if match]
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_folder), version_base="1.3"):
        try:
            return compose("config", overrides=choices)
        except HydraException:  # one of them is misspelled itself
            return compose("config")


def _keys(node: DictConfig, before: str = "") -> Iterator[str]:
    """Every key of a configuration, with the path to it."""
    for key in node:
        path = f"{before}{key!s}"
        yield path
        value = node._get_node(key)
        if isinstance(value, DictConfig) and not value._is_none() and not value._is_missing():
            yield from _keys(value, f"{path}.")
