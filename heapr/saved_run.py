"""Runs the configuration that a run saved in its folder again.

In: the command line of run.py, such as `--config-path outputs/runs/<run>/.hydra pruning.ratio=0.5`. Out: the
arguments with which Hydra takes that configuration and our settings of Hydra itself, whose file
`conf/config.yaml` is not read then.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from heapr.errors import ConfigError

OF_HYDRA, CONFIG, SETTINGS, OVERRIDES = ".hydra", "config.yaml", "hydra.yaml", "overrides.yaml"
CONFIG_PATH = ("--config-path", "-cp")
RERUN = "--experimental-rerun"
OVERRIDE = "override "  # in a defaults list, before a group that is there already


def with_saved_run(arguments: Sequence[str], config_folder: Path) -> list[str]:
    """Replace `--config-path <folder of a run>` by what Hydra needs to run its configuration again.

    Args:
        arguments: of the command line.
        config_folder: conf/.

    Returns:
        the arguments as they are, unless one names the folder of a run.

    Raises:
        ConfigError: --experimental-rerun, or an option of a group that a saved configuration cannot take.
    """
    given = _options(arguments)
    if RERUN in given:
        folder = Path(given[RERUN]).parent
        raise ConfigError(
            f"{RERUN} needs a pickle, which no run writes; write --config-path={shlex.quote(str(folder))}"
        )
    named = given.get(CONFIG_PATH[0])
    saved = None if named is None else _saved(Path(named), config_folder.parent)
    if saved is None:
        return list(arguments)
    others = list(_without_config_path(arguments))
    _check_no_option(others, config_folder, saved)
    path = [f"--config-path={saved}", "--config-name=config"]
    return [*path, *_settings_of_hydra(config_folder), *others]


def _options(arguments: Sequence[str]) -> dict[str, str]:
    """Values of the options that this module reads, written `--option value` or `--option=value`.

    Both names of one option are one here; the last value counts, as for Hydra.
    """
    found: dict[str, str] = {}
    for number, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name in (*CONFIG_PATH, RERUN):
            following = "".join(arguments[number + 1 : number + 2])
            option = CONFIG_PATH[0] if name in CONFIG_PATH else name
            found[option] = value if equals else following
    return found


def _saved(folder: Path, root: Path) -> Path | None:
    """The folder of a run's configuration: the one given, or .hydra in it; None if it holds none.

    Raises:
        ConfigError: the folder does not exist, here or beside run.py, where Hydra looks for it.
    """
    if not folder.is_dir() and not (root / folder).is_dir():
        raise ConfigError(f"--config-path={folder} is not a folder; give the folder of a run, or its .hydra")
    for candidate in (folder, folder / OF_HYDRA):
        if (candidate / CONFIG).is_file() and (candidate / SETTINGS).is_file():
            return candidate.resolve()
    return None


def _without_config_path(arguments: Sequence[str]) -> Iterator[str]:
    takes_next = False
    for argument in arguments:
        if takes_next:
            takes_next = False
            continue
        if argument.partition("=")[0] not in CONFIG_PATH:
            yield argument
        takes_next = argument in CONFIG_PATH


def _check_no_option(arguments: Sequence[str], config_folder: Path, saved: Path) -> None:
    """Refuse what chooses an option of a group: a saved configuration has fields and no groups."""
    for argument in arguments:
        group, equals, _ = argument.lstrip("+").partition("=")
        if equals and (config_folder / group.partition("@")[0]).is_dir():
            before = map(str, OmegaConf.load(saved / OVERRIDES))
            others = [override for override in before if not override.startswith(f"{group}=")]
            command = shlex.join([*others, argument])
            raise ConfigError(
                f"'{argument}' chooses an option, and a saved configuration takes only fields"
                f" (group.field=value); write python run.py {command}"
            )


def _settings_of_hydra(config_folder: Path) -> list[str]:
    """What conf/config.yaml says about Hydra itself, as overrides, and where its options are."""
    content: Any = OmegaConf.to_container(OmegaConf.load(config_folder / CONFIG))
    options = []
    for entry in content["defaults"]:
        items = entry.items() if isinstance(entry, dict) else ()
        for name, option in items:
            if str(name).startswith(OVERRIDE):
                options.append(f"{str(name).removeprefix(OVERRIDE)}={option}")
    fields = list(_fields(content["hydra"], "hydra"))
    return [f'hydra.searchpath=["file://{config_folder}"]', *options, *fields]


def _fields(values: Any, path: str) -> Iterator[str]:
    """Nested values as overrides; text is in Hydra's quotes."""
    if isinstance(values, dict):
        for name, value in values.items():
            yield from _fields(value, f"{path}.{name}")
    else:
        written = f'"{values}"' if isinstance(values, str) else str(values).lower()
        # ++, because callbacks are not among Hydra's own fields
        yield f"++{path}={written}"
