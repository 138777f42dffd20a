"""Checks what Hydra composes before Hydra acts on it: makes folders, opens logs, builds launchers.

A configuration file can set Hydra's own fields too, and these name classes, which Hydra would build, and
shell commands. In: a composed configuration and the command line. Out: nothing, or a refusal.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from heapr.definitions import conf_folder
from heapr.errors import ConfigError
from heapr.files import user_path
from heapr.hydra_folders import check_folders_of_hydra
from heapr.secrets import refuse_secrets
from heapr.targets import TARGET, check_targets

ALLOW = "plugins.allow"
# They let code run, so no file may set them.
COMMAND_LINE_ONLY = (ALLOW, "model.trust_remote_code")
# Fields of Hydra that run commands; a file from elsewhere may not set them.
COMMANDS = ("job.env_set", "job.env_copy", "launcher.setup", "launcher.python", "launcher.srun_args",
            "launcher.additional_parameters")  # fmt: skip
VARIABLE = r"oc\.env:\s*(\w+)"  # of the environment, in the value of a field
CLASS_KEYS = (TARGET, "()", "class")  # the last two are of Python's logging
# What Hydra may build or look up: what it ships, its launchers, and what conf/hydra names.
BUILT_BY_HYDRA = (
    "hydra._internal.core_plugins.",
    "hydra_plugins.hydra_joblib_launcher.",
    "hydra_plugins.hydra_submitit_launcher.",
    "hydra_plugins.hydra_ray_launcher.",
    "hydra_plugins.hydra_optuna_sweeper.",
    "hydra_plugins.heapr_callbacks.",
    "hydra_plugins.heapr_jobs.",
    "optuna.samplers.",
)
LOGGING = (
    "logging.StreamHandler",
    "logging.FileHandler",
    "logging.Formatter",
    "heapr.secrets.Formatter",
    "heapr.log_file.LogFile",
    "ext://sys.stdout",
    "ext://sys.stderr",
)


@contextmanager
def checked_compositions() -> Iterator[None]:
    """Inside the context, everything that Hydra composes is checked before Hydra uses it.

    Raises:
        ConfigError: see `check_composed`.
    """
    compose = ConfigLoaderImpl.load_configuration

    def compose_and_check(
        self: ConfigLoaderImpl, config_name: str | None, overrides: list[str], *arguments: Any, **named: Any
    ) -> DictConfig:
        config = compose(self, config_name, overrides, *arguments, **named)
        check_composed(config, overrides)
        return config

    with mock.patch.object(ConfigLoaderImpl, "load_configuration", compose_and_check):
        yield


def check_composed(config: DictConfig, overrides: Sequence[str]) -> None:
    """Check a configuration with Hydra's node.

    Args:
        config: as composed.
        overrides: of the command line.

    Raises:
        ConfigError: it names something to build that is neither heapr's nor allowed, sets what only the
            command line may set, holds a secret, or has no folder for its outputs.
    """
    given = _given(overrides)
    refuse_secrets(list(overrides), "an argument of the command line")
    content = OmegaConf.to_container(config, resolve=False)
    assert isinstance(content, dict)
    plain = {str(key): value for key, value in content.items()}
    hydra = plain.pop("hydra", {})
    refuse_secrets(plain, "")
    if "oc.env" in str(plain):
        refuse_secrets(_resolved(config), "")
    of_hydra = {name: value for name, value in hydra.items() if name != "help"}
    refuse_secrets(of_hydra, "hydra")
    for name in re.findall(VARIABLE, str(of_hydra)):
        refuse_secrets(os.environ.get(name), f"hydra, with the variable {name},")
    _check_command_line_only(plain, hydra, given)
    allow = given.get(ALLOW) or []
    check_targets(plain, allow if isinstance(allow, list) else [])
    _check_hydra(hydra, allow)
    if _comes_from_elsewhere(hydra):
        _check_commands(hydra, given)
        _check_task_folders(plain, given)
    _check_folders(plain, hydra)
    check_folders_of_hydra(hydra)


def _given(overrides: Sequence[str]) -> dict[str, Any]:
    """The values on the command line, by key."""
    given = {}
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        if not override.is_sweep_override():
            given[override.key_or_group] = override.value()
    return given


def _resolved(config: DictConfig) -> dict[str, Any]:
    """The configuration without Hydra's node, with the values of environment variables that it refers to."""
    keys = [str(key) for key in config if key != "hydra"]
    own = OmegaConf.masked_copy(config, keys)
    try:
        resolved = OmegaConf.to_container(own, resolve=True)
    except OmegaConfBaseException:
        return {}  # it is refused where it is used
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}


def _check_command_line_only(
    config: Mapping[str, Any], hydra: Mapping[str, Any], given: Mapping[str, Any]
) -> None:
    """Refuse values of `COMMAND_LINE_ONLY` that come from a file.

    Raises:
        ConfigError: there is one.
    """
    swept = _at(hydra, "sweeper.params")
    for name in COMMAND_LINE_ONLY:
        value = _at(config, name)
        in_params = [key for key in swept if name in str(key)] if isinstance(swept, Mapping) else []
        if in_params or (value and given.get(name) != value):
            raise ConfigError(
                f"{name}={value} comes from a file, and it lets code run; leave it out there, and give it on"
                " the command line"
            )


def _check_hydra(hydra: Mapping[str, Any], allow: Sequence[str]) -> None:
    """Refuse classes in Hydra's node that are neither its own nor allowed.

    Raises:
        ConfigError: there is one.
    """
    for where, name in _named(hydra, "hydra"):
        known = LOGGING if "logging" in where else BUILT_BY_HYDRA
        is_known = name in known or any(name.startswith(one) for one in known if one.endswith("."))
        is_allowed = any(name.startswith(f"{package}.") for package in allow)
        if not is_known and not is_allowed:
            raise ConfigError(
                f"{where}='{name}' is nothing that heapr lets Hydra build; leave it out, or give"
                " plugins.allow=[<its package>] on the command line if you trust it"
            )


def _named(value: Any, where: str) -> Iterator[tuple[str, str]]:
    """Everything below a value of Hydra's node that names an object of Python, with its place."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            place = f"{where}.{key}"
            if key in CLASS_KEYS:
                yield place, str(item)
            else:
                yield from _named(item, place)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _named(item, where)
    elif isinstance(value, str) and value.startswith("ext://"):
        yield where, value


def _comes_from_elsewhere(hydra: Mapping[str, Any]) -> bool:
    """Whether a folder of configuration besides conf/ and those of packages was read."""
    sources = _at(hydra, "runtime.config_sources") or []
    folders = [Path(source["path"]) for source in sources if source["schema"] == "file"]
    return any(folder.resolve() != conf_folder() for folder in folders)


def _check_commands(hydra: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Refuse shell commands and variables of the environment that no argument gives.

    Raises:
        ConfigError: there is one.
    """
    for name in COMMANDS:
        is_given = any(key.startswith(f"hydra.{name}") for key in given)
        if _at(hydra, name) and not is_given:
            raise ConfigError(
                f"hydra.{name} runs commands, and with --config-dir it may come from elsewhere; give it on"
                " the command line, or in conf/"
            )


def _check_task_folders(config: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Refuse folders of lm-eval's tasks, which hold code, that no argument gives.

    Raises:
        ConfigError: there is one.
    """
    evaluation = config.get("evaluation")
    for name, entry in evaluation.items() if isinstance(evaluation, Mapping) else ():
        place = f"evaluation.{name}.include_path"
        if isinstance(entry, Mapping) and entry.get("include_path") and place not in given:
            raise ConfigError(
                f"{place}={entry['include_path']} is a folder of tasks, which may hold code, and with"
                " --config-dir it may come from elsewhere; give it on the command line"
            )


def _check_folders(config: Mapping[str, Any], hydra: Mapping[str, Any]) -> None:
    """Refuse folders that would put results where nobody looks for them.

    Raises:
        ConfigError: there is one.
    """
    outputs = _at(config, "paths.outputs")
    if not str(outputs or "").strip():
        raise ConfigError(
            f"paths.outputs={'null' if outputs is None else repr(outputs)} names no folder; give one, for"
            " example paths.outputs=outputs"
        )
    user_path(str(outputs))  # refuses what no folder can be called
    if _at(hydra, "job.chdir"):
        raise ConfigError(
            "hydra.job.chdir=true would give every run a store of its own, because paths are relative to the"
            " folder that heapr is started in; leave it out"
        )


def _at(value: Any, path: str) -> Any:
    """The value at a path of nested mappings; None if there is none."""
    for key in path.split("."):
        if not isinstance(value, Mapping) or key not in value:
            return None
        value = value[key]
    return value
