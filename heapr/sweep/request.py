"""What the command line of sweep.py asks for.

In: arguments. Out: a `Request`, or a refusal.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from heapr.definitions import is_installed, sweep_command
from heapr.errors import ConfigError
from heapr.files import user_path
from heapr.overrides import SEARCH_PATH, config_dir_as_override
from heapr.sweep.definition import is_tiny
from heapr.words import did_you_mean

SWITCHES = ("report_only", "results", "baselines")
DRY_RUN = "--dry-run"
LAUNCHER = "hydra/launcher="  # what launcher= stands for
OF_HYDRA = ("hydra.", "hydra/", "+hydra.")  # beginnings of overrides of Hydra itself
# Our own keys, and all options as they are listed for a reader.
KEYS = ("experiment", "report_dir", "launcher", *SWITCHES)
KNOWN = [DRY_RUN, "--help", "--config-dir", *(f"{key}=" for key in KEYS)]


@dataclass(frozen=True)
class Request:
    """What the command line asks for.

    Attributes:
        experiment: its name; None to report a folder.
        report_dir: folder to report; None for an experiment.
        dry_run: show what would be made and stop.
        report_only: report the newest sweep without running anything.
        results: keep tables and figures with the experiment.
        baselines: run the experiment's baselines too.
        overrides: for all jobs.
        settings: overrides of Hydra itself.
        command: as it was typed.
    """

    experiment: str | None
    report_dir: Path | None
    dry_run: bool
    report_only: bool
    results: bool
    baselines: bool
    overrides: tuple[str, ...]
    settings: tuple[str, ...]
    command: str

    @property
    def has_launcher(self) -> bool:
        """Whether jobs run side by side."""
        launchers = [setting for setting in self.settings if setting.startswith(LAUNCHER)]
        return bool(launchers) and launchers[-1] != f"{LAUNCHER}basic"

    @property
    def search_path(self) -> list[str]:
        """The overrides that add folders of configuration to conf/."""
        return [setting for setting in self.settings if setting.startswith(SEARCH_PATH)]

    @property
    def version(self) -> str:
        return "tiny" if is_tiny(self.overrides) else "paper"


def read_request(arguments: Sequence[str], experiments: Sequence[str]) -> Request:
    """Parse the command line.

    Args:
        arguments: of the command line.
        experiments: names that are known, for messages.

    Raises:
        ConfigError: an argument is unknown, or arguments contradict each other.
    """
    own, rest = _sort(config_dir_as_override(arguments))
    for argument in rest:
        _check_override(argument)
    dry_run = DRY_RUN in arguments
    if ("experiment" in own) == ("report_dir" in own):
        raise ConfigError(
            f"give either experiment=<name> or report_dir=<folder>; experiments: {', '.join(experiments)}"
        )
    if "report_dir" in own and (rest or len(own) > 1 or dry_run):
        raise ConfigError(
            "report_dir=<folder> takes no other arguments: a report is made from what is in the folder"
        )
    if own.get("results") == "true" and is_installed():
        raise ConfigError(
            "results=true keeps tables and figures in the repository's experiments/, and heapr is installed"
            " without one; leave it out: they are in the sweep's folder too"
        )
    settings = [argument for argument in rest if argument.startswith(OF_HYDRA)]
    overrides = [argument for argument in rest if argument not in settings]
    if own.get("report_dir") == "":
        raise ConfigError("report_dir= names no folder; give one below outputs/sweeps")
    report_dir = user_path(own["report_dir"]) if "report_dir" in own else None
    switches = {key: _switch(key, own.get(key, "false")) for key in SWITCHES}
    return Request(
        experiment=own.get("experiment"),
        report_dir=report_dir,
        dry_run=dry_run,
        overrides=tuple(overrides),
        settings=tuple(settings),
        command=f"{sweep_command()} {shlex.join(arguments)}",
        **switches,
    )


def _sort(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Return the values of our own options by key, and all other arguments; --dry-run is in neither."""
    own: dict[str, str] = {}
    rest: list[str] = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key == "launcher":
            rest.append(f"{LAUNCHER}{value}")
        elif key in own:
            raise ConfigError(f"'{argument}': {key} is given twice; give it once")
        elif key in KEYS:
            own[key] = value
        elif argument != DRY_RUN:
            rest.append(argument)
    return own, rest


def _check_override(argument: str) -> None:
    """Refuse what is no override of a sweep's jobs."""
    is_override = "=" in argument or argument.startswith("~")
    if argument.startswith("-") or not is_override:
        hint = did_you_mean(argument, KNOWN)
        raise ConfigError(
            f"'{argument}' is neither an override (key=value) nor an option; {hint}options:"
            f" {', '.join(KNOWN)}"
        )
    if argument.startswith("dry_run="):
        raise ConfigError(f"'{argument}' is for a single run; give --dry-run to see what a sweep would do")


def _switch(key: str, value: str) -> bool:
    if value not in ("true", "false"):
        raise ConfigError(f"{key}={value} is neither true nor false")
    return value == "true"
