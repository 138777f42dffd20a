"""Explains what is wrong with an override that Hydra cannot read, and how to write it in a shell.

In: an argument of the command line, such as `paths.outputs=/tmp/é`. Out: one line that names it and says what
to type instead.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from heapr.definitions import run_command
from heapr.errors import ConfigError

UNQUOTED = re.compile(r"[\w /\-\\+.$%*@?|:,]", re.ASCII)  # what a value may contain without quotes
ONE_OPTION = {
    "model",
    "calibration",
    "score",
    "pruning",
    "pruning/repair",
    "recipe",
    "evaluation",
    "tracking",
    "runtime",
    "paths",
}
SWEEP_OPTIONS = {"-m", "--multirun"}
# Hydra's own options, without a value and followed by one.
OPTIONS = {"--help", "-h", "--hydra-help", "--version", "--resolve", "--run", "-r", "--multirun", "-m"}
OPTIONS |= {"--info", "-i", "--shell-completion", "-sc"}
OPTIONS_WITH_VALUE = {"--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn"}
CONFIG_DIR = {"--config-dir", "-cd"}
OPTIONS_WITH_VALUE |= CONFIG_DIR | {"--experimental-rerun"}
SEARCH_PATH = "hydra.searchpath="


def options_first(arguments: Sequence[str]) -> list[str]:
    """Arguments of run.py in the order that Hydra wants: its options, then overrides.

    Raises:
        ConfigError: there is no such option.
    """
    options: list[str] = []
    overrides: list[str] = []
    takes_next = False
    for argument in arguments:
        name = argument.partition("=")[0]
        if takes_next:
            options.append(argument)
            takes_next = False
        elif not argument.startswith("-"):
            overrides.append(argument)
        elif name in OPTIONS | OPTIONS_WITH_VALUE:
            options.append(argument)
            takes_next = argument in OPTIONS_WITH_VALUE
        else:
            key = name.lstrip("-").replace("-", "_")
            raise ConfigError(
                f"unknown option '{argument}'; fields are set without dashes ({key}=...), for example"
                f" dry_run=true; {run_command()} --help lists them"
            )
    return options + overrides


def config_dir_as_override(arguments: Sequence[str]) -> list[str]:
    """Arguments with Hydra's option --config-dir, which adds a folder to conf/, as the override that does so.

    Hydra reads the option only on its own command line, and the override anywhere.

    Raises:
        ConfigError: the option has no folder.
    """
    rest: list[str] = []
    remaining = iter(arguments)
    for argument in remaining:
        name, equals, value = argument.partition("=")
        if name not in CONFIG_DIR:
            rest.append(argument)
            continue
        folder = Path(value if equals else next(remaining, "")).expanduser().resolve()
        if not folder.is_dir():
            raise ConfigError(f"{name}: '{folder}' is not a folder; give the folder of your own groups")
        escaped = str(folder).replace("'", "\\'")
        rest.append(f"{SEARCH_PATH}['file://{escaped}']")
    return rest


def check_one_option(overrides: Sequence[str]) -> None:
    """Refuse several options of a group that takes one, which Hydra would merge, the last one winning.

    Args:
        overrides: arguments of the command line, such as `score=[heapr,fisher]`.

    Raises:
        ConfigError: one of them is such a list; the message names it.
    """
    for override in overrides:
        group, _, value = override.partition("=")
        if group in ONE_OPTION and value.startswith("["):
            options = value.strip("[]")
            raise ConfigError(
                f"'{override}' gives a list, but {group} takes one option; give one, or run each with -m"
                f" {group}={options}"
            )


def explain_override(override: str, arguments: Sequence[str]) -> str:
    """One line for an argument that Hydra cannot read.

    Args:
        override: the argument as Hydra received it, without the shell's quotes.
        arguments: all arguments; they show whether a comma separates values of a sweep.
    """
    key, equals, value = override.partition("=")
    if not override.isprintable():
        return (
            f"argument {override!r} holds a character that cannot be printed, such as the end of a line;"
            " leave it out"
        )
    if not equals:
        return f"argument '{override}' is not an override; give key=value, or an option that --help lists"
    if not key.strip("+~") or not _is_read(f"{key}=1"):
        return (
            f"argument '{override}': '{key}' cannot be the name of a field; give key=value with a key that"
            " --help lists"
        )
    with_one = f"{key}={value.lstrip('=')}"
    if value.startswith("=") and _is_read(with_one):
        return f"argument '{override}' has one '=' too many; write {shlex.quote(with_one)}"
    marks = [letter for letter in _without_brackets(value) if not UNQUOTED.fullmatch(letter)]
    distinct = " ".join(dict.fromkeys(marks))
    reason = f"{distinct} in a value must be inside quotes" if marks else "its value cannot be read"
    is_sweep = not SWEEP_OPTIONS.isdisjoint(arguments)
    written = quoted_override(key, value, is_sweep=is_sweep)
    if written is None:
        return (
            f"argument '{override}': {reason}; put \"...\" around that part of the value, and '...' around"
            " the whole argument"
        )
    return (
        f"argument '{override}': {reason}; write {written} (the outer quotes are the shell's, the inner ones"
        " the value's)"
    )


def explain_comma(override: str) -> str:
    """One line for a value with a comma outside a sweep."""
    key, _, value = override.partition("=")
    if key in ONE_OPTION:
        return (
            f"argument '{override}' names several options, and {key} takes one; give one, or add -m to run"
            " once for each"
        )
    one = quoted_override(key, value, is_sweep=False, always=True)
    several = shlex.quote(f"{key}=[{value}]")
    return (
        f"argument '{override}' has a comma; write {one} for one value, {several} for a list, or add -m to"
        " run once for each"
    )


def explain_option(arguments: Sequence[str], config_folder: Path) -> str:
    """One line for a group's option that is a number, true, false or null instead of a name.

    Args:
        arguments: all arguments; one of them is at fault.
        config_folder: its folders are the groups.
    """
    folders = config_folders(config_folder, arguments)
    for argument in arguments:
        key, equals, value = argument.partition("=")
        group = key.lstrip("+~").partition("@")[0]
        is_group = any((folder / group).is_dir() for folder in folders)
        if not equals or not is_group or isinstance(_read(argument), str | list):
            continue
        if not group:
            return explain_override(argument, arguments)
        known = ", ".join(options_of(group, folders))
        return (
            f"argument '{argument}': {value} is not the name of an option; known options of {group}: {known}"
        )
    return "an option of a group is not a name; see --help"


def options_of(group: str, folders: Sequence[Path]) -> list[str]:
    """Names of a group's options in all folders, sorted."""
    names = {file.stem for folder in folders for file in (folder / group).glob("*.yaml")}
    return sorted(names)


def config_folders(config_folder: Path, arguments: Sequence[str]) -> list[Path]:
    """conf/, and the user's own folder of options if --config-dir names one."""
    folders = [config_folder]
    for number, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name in CONFIG_DIR:
            following = "".join(arguments[number + 1 : number + 2])
            folders.append(Path(value if equals else following).absolute())
    return folders


def quoted_override(key: str, value: str, *, is_sweep: bool, always: bool = False) -> str | None:
    """The override with Hydra's quotes where it needs them, quoted once more for the shell.

    Args:
        key, value: the two sides of the override.
        is_sweep: a comma separates values of a sweep.
        always: quote the value even if Hydra could read it without quotes.

    Returns:
        None if no quotes make it readable.
    """
    if value.startswith("{") and value.endswith("}"):
        return None  # it may be a mapping, and where its values begin would be a guess
    is_list = value.startswith("[") and value.endswith("]")
    if is_list or (is_sweep and "," in value):
        inner = value[1:-1] if is_list else value
        quoted = [item if _is_read(f"{key}={item}") else _in_quotes(item) for item in inner.split(",")]
        joined = ",".join(quoted)
        written = f"{key}=[{joined}]" if is_list else f"{key}={joined}"
    elif always or not _is_read(f"{key}={value}"):
        written = f"{key}={_in_quotes(value)}"
    else:
        written = f"{key}={value}"
    return shlex.quote(written) if _is_read(written) else None


def _in_quotes(text: str) -> str:
    """Text between double quotes, escaped as Hydra expects: a backslash is special only before a quote."""
    escaped = re.sub(r'(\\*)"', r'\1\1\\"', text)
    return '"' + re.sub(r"(\\+)$", r"\1\1", escaped) + '"'


def _without_brackets(value: str) -> str:
    """A value without the brackets of a list or mapping."""
    return value[1:-1] if (value[:1], value[-1:]) in {("[", "]"), ("{", "}")} else value


def _is_read(override: str) -> bool:
    """Whether Hydra can read an override."""
    return not isinstance(_read(override), HydraException)


def _read(override: str) -> Any:
    """The value that Hydra reads from an override, or the error that it raises."""
    try:
        return OverridesParser.create().parse_override(override).value()
    except HydraException as error:
        return error


LAUNCHER_EXTRAS = {  # what installs the package of a launcher, by its plug-in's module
    "hydra_joblib_launcher": "heapr[joblib]",
    "hydra_submitit_launcher": "heapr[slurm]",
    "hydra_ray_launcher": "heapr[ray]",
}


def explain_launcher(text: str) -> str:
    """The message for a launcher whose package is not installed.

    Args:
        text: holds the name of the launcher's class.
    """
    for module, extra in LAUNCHER_EXTRAS.items():
        if module in text:
            return f"hydra/launcher needs a package that is not installed; install it: pip install '{extra}'"
    return f"{text}; choose hydra/launcher=joblib, submitit_local, submitit_slurm or ray"
