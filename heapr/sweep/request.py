"""What the command line of sweep.py asks for.

In: arguments. Out: a `Request`, or a refusal.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from heapr.errors import ConfigError
from heapr.files import user_path
from heapr.sweep.definition import is_tiny
from heapr.words import did_you_mean

SWITCHES = ("report_only", "results", "baselines")
LAUNCHER = "hydra/launcher="  # what launcher= stands for


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
    own: dict[str, str] = {}
    rest: list[str] = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key in ("experiment", "report_dir", *SWITCHES):
            own[key] = value
        elif key == "launcher":
            rest.append(f"{LAUNCHER}{value}")
        elif argument != "--dry-run":
            rest.append(argument)
    for argument in rest:
        if argument.startswith("-") or ("=" not in argument and not argument.startswith("~")):
            keys = ("experiment", "report_dir", "launcher", *SWITCHES)
            known = ["--dry-run", "--help", *(f"{key}=" for key in keys)]
            hint = did_you_mean(argument, known)
            raise ConfigError(
                f"'{argument}' is neither an override (key=value) nor an option; {hint}options:"
                f" {', '.join(known)}"
            )
        if argument.startswith("dry_run="):
            raise ConfigError(
                f"'{argument}' is for a single run; give --dry-run to see what a sweep would do"
            )
    if ("experiment" in own) == ("report_dir" in own):
        raise ConfigError(
            f"give either experiment=<name> or report_dir=<folder>; experiments: {', '.join(experiments)}"
        )
    if "report_dir" in own and (rest or len(own) > 1 or "--dry-run" in arguments):
        raise ConfigError(
            "report_dir=<folder> takes no other arguments: a report is made from what is in the folder"
        )
    settings = tuple(argument for argument in rest if argument.startswith(("hydra.", "hydra/", "+hydra.")))
    return Request(
        experiment=own.get("experiment"),
        report_dir=user_path(own["report_dir"]) if "report_dir" in own else None,
        dry_run="--dry-run" in arguments,
        overrides=tuple(argument for argument in rest if argument not in settings),
        settings=settings,
        command=shlex.join(["python", "sweep.py", *arguments]),
        **{key: _switch(key, own.get(key, "false")) for key in SWITCHES},
    )


def _switch(key: str, value: str) -> bool:
    if value not in ("true", "false"):
        raise ConfigError(f"{key}={value} is neither true nor false")
    return value == "true"
