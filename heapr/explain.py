"""Says in one line what is wrong with a configuration that Hydra could not compose.

In: the error that Hydra or omegaconf raised, and the arguments of the command line. Out: what was given,
why it cannot be, and what to type instead.
"""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ValidationError
from yaml import YAMLError

from heapr.overrides import (
    config_folders,
    explain_comma,
    explain_launcher,
    explain_option,
    explain_override,
    options_of,
)
from heapr.unknown_keys import EXPERIMENT, USED_WITH, explain_unknown_key
from heapr.words import did_you_mean, first_line

# How messages of omegaconf and Hydra begin:
# An override sets a field of null, or all of them.
FIELD_OF_NOTHING = ("Unexpected type for root: NoneType", "'NoneType' object has no attribute 'get'")
OPTION_WITHOUT_NAME = "Config group override must be a string or a list"  # score=3
COMMA_OUTSIDE_SWEEP = "Ambiguous value for argument"  # a=1,2
UNKNOWN_PLUGIN = "Unknown plugin class"  # a launcher whose package is not installed
UNREADABLE_VALUE = "Error merging override"  # a value of the wrong type
# +pruning.ratio=1, and +score=fisher
THERE_ALREADY = "An item is already at '([^']+)'|Multiple values for ([^ ]+)\\. To override"
NOT_A_FIELD = r"Key '[^']+' not in '\w+'\n *full_key: (\S+)"  # +corpus=c4
OF_FIELD = r"\n *full_key: (\S+)"  # a value of the wrong type in a saved configuration
NOT_THERE = "Could not delete from config. '([^']+)' does not exist"  # ~foo

OF_COMPOSITION = "hydra/_internal/config_loader_impl.py"  # where Hydra composes
OF_LOGGING = "/logging/config.py"  # where Python reads how to log
OF_COMPLETION = "Expecting one subcommand from"  # --shell-completion
OF_ITS_TYPE = "give a value of the field's type (heapr/schema.py)"
OF_LAUNCHER = "hydra.launcher."
# A file sets a field that is not there.
IN_FILE = r"In '([^']+)': ConfigKeyError.*full_key: (\S+)"


def explain_builtin(error: Exception, config_folder: Path | None) -> str | None:
    """The message for a mistake that Hydra answers with an error of Python; None for any other error."""
    text = str(error)
    if isinstance(error, YAMLError):
        return explain_yaml(error)
    if _is_raised_in(error, OF_COMPOSITION):
        reason = "it refers to itself" if isinstance(error, RecursionError) else first_line(error)
        if isinstance(error, KeyError):  # of hydra.job.env_copy
            reason = f"the environment has no variable {reason}"
        if not text.startswith((OPTION_WITHOUT_NAME, UNKNOWN_PLUGIN, *FIELD_OF_NOTHING)):
            return f"a configuration file cannot be read: {reason}; correct it"
    if _is_raised_in(error, OF_LOGGING):
        reason = first_line(error.__cause__ or error)
        return (
            f"hydra.job_logging or hydra.hydra_logging cannot be used: {reason}; leave it out, or correct it"
        )
    if text.startswith(OPTION_WITHOUT_NAME) and config_folder is not None:
        return explain_option(sys.argv[1:], config_folder)
    if text.startswith(UNKNOWN_PLUGIN):
        return explain_launcher(text)
    return _explain_other(error, text)


def _explain_other(error: Exception, text: str) -> str | None:
    """The message for a mistake that has no file and no option of a group; None for any other error."""
    if text.startswith(OF_COMPLETION):
        return f"--shell-completion: {first_line(error)}; write --shell-completion install=bash"
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
    match = re.search(THERE_ALREADY, text)
    if match:
        return _explain_there_already(match[1] or match[2], overrides)
    if config_folder is not None:
        message = _explain_name(text, config_folder, overrides)
        if message is not None:
            return message
    if text.startswith(UNREADABLE_VALUE) and error.__cause__ is not None:
        return _explain_unreadable(text, first_line(error.__cause__), config_folder)
    match = re.search(OF_FIELD, text)
    is_of_field = match is not None and isinstance(error, ValidationError)
    return f"{match[1]}: {first_line(error)}; {OF_ITS_TYPE}" if match and is_of_field else text


def _explain_name(text: str, config_folder: Path, overrides: Sequence[str]) -> str | None:
    """The message for a key or an option that is not there; None for any other mistake."""
    match = re.search(IN_FILE, text, re.DOTALL)
    if match and match[2] in USED_WITH:
        return explain_unknown_key(match[2], _composed(overrides, config_folder))
    if match:
        return f"conf/{match[1]}.yaml sets '{match[2]}': {_unknown_field(match[2])}"
    match = re.match(r"Could not override '([^']+)'", text)
    if match:
        return _explain_unmatched(match[1], text, config_folder, overrides)
    match = re.match(NOT_THERE, text) or re.search(NOT_A_FIELD, text)
    if match:
        return explain_unknown_key(match[1], _composed(overrides, config_folder))
    match = re.search(r"Could not (?:find|load) '([^']+)'", text)
    folders = config_folders(config_folder, overrides)
    if match and any((folder / match[1]).parent.is_dir() for folder in folders):
        return _unknown_option(match[1], folders)
    return None


def _explain_there_already(key: str, overrides: Sequence[str]) -> str:
    """The message for a + before a key that the configuration has."""
    for override in overrides:
        name = override.partition("=")[0]
        if name.startswith("+") and name.lstrip("+") == key:
            return f"argument '{override}': a + adds what is not there; write {override.lstrip('+')}"
    return f"'{key}' is given twice; give it once, without a +"


def _unknown_field(path: str) -> str:
    """Why a file or an override cannot set a field that the chosen options do not have."""
    if path.startswith(OF_LAUNCHER):
        return (
            "the launcher that is chosen has no such option; choose one with launcher=<name> (of run.py -m:"
            " hydra/launcher=<name>), and keep options of your own in conf/hydra/launcher/<name>.yaml"
            " (docs/cluster.md)"
        )
    return "the options that are chosen have no such field; see --help"


def _explain_unreadable(text: str, reason: str, config_folder: Path | None) -> str:
    """The message for a value of the wrong type, such as the name of an option for a field."""
    override = text.removeprefix(UNREADABLE_VALUE).removeprefix(" ")
    key, _, value = override.partition("=")
    group = key.replace(".", "/")
    if config_folder is not None and (config_folder / group).is_dir():
        return f"'{override}': options of a group are chosen with a slash; write {group}={value}"
    return f"{override}: {reason}; {OF_ITS_TYPE}"


def _explain_unparsed(override: str, text: str, overrides: Sequence[str]) -> str:
    """The message for an override that Hydra cannot parse, or whose function, such as int(x), fails."""
    evaluated = [line for line in text.splitlines() if "while evaluating" in line]
    if evaluated:
        return f"argument '{override}': {evaluated[0]}"
    return explain_override(override, overrides)


def _explain_unmatched(path: str, text: str, config_folder: Path, overrides: Sequence[str]) -> str:
    """The message for a key that is not in the configuration, or a group that is used inside others."""
    if path.startswith(OF_LAUNCHER):
        return f"'{path}': {_unknown_field(path)}"
    is_unknown_key = "To append to your config" in text
    if path in USED_WITH or path == EXPERIMENT or is_unknown_key:
        return explain_unknown_key(path, _composed(overrides, config_folder))
    return text


def _unknown_option(path: str, folders: Sequence[Path]) -> str:
    """The message for a misspelled option of a group."""
    group, _, option = path.rpartition("/")
    known = options_of(group, folders)
    suggestion = did_you_mean(option, known)
    return f"unknown option '{path}'; {suggestion}known options of {group}: {', '.join(known)}"


def _composed(overrides: Sequence[str], config_folder: Path) -> Mapping[str, Any]:
    """The configuration with the first option chosen for each group, and no other override."""
    matches = [re.fullmatch(r"([a-z_/]+)=([a-z_0-9]+)(,.*)?", override) for override in overrides]
    choices = [f"{match[1]}={match[2]}" for match in matches if match]
    _, *of_user = config_folders(config_folder, overrides)
    searched = [f'hydra.searchpath=["file://{folder}"]' for folder in of_user]
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_folder), version_base="1.3"):
        try:
            config = compose("config", overrides=[*searched, *choices])
        except HydraException:  # one of them is misspelled itself
            config = compose("config")
    return _plain(config)


def _plain(config: DictConfig) -> Mapping[str, Any]:
    content = OmegaConf.to_container(config)
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}
