"""Refuses fields of Hydra that would write or read files where nobody expects it, or that make it fail.

In: Hydra's node of a composed configuration, in JSON types, with interpolations as they are. Out: nothing, or
a refusal.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from heapr.errors import ConfigError


def check_folders_of_hydra(hydra: Mapping[str, Any]) -> None:
    """Check where Hydra writes its files, and where it read options from.

    Raises:
        ConfigError: they lie outside of their folder, jobs would share one, or no job could start.
    """
    sweep = _section(hydra, "sweep")
    _check_is_below("hydra.output_subdir", hydra.get("output_subdir"), "the run's folder")
    _check_is_below("hydra.sweep.subdir", sweep.get("subdir"), "the sweep's folder")
    if not str(_section(hydra, "run").get("dir", ".")).strip():
        raise ConfigError("hydra.run.dir= names no folder; leave it out, or give one")
    subdir = str(sweep.get("subdir", "0"))
    # A sweeper of heapr's gives each job its number.
    if "${" not in subdir and not subdir.isdecimal():
        raise ConfigError(
            f"hydra.sweep.subdir={subdir} is one folder for all jobs, which would overwrite each other's"
            " results; leave it out, or use ${hydra.job.num} in it"
        )
    size = _section(hydra, "sweeper").get("max_batch_size")
    if isinstance(size, int) and size < 1:
        raise ConfigError(f"hydra.sweeper.max_batch_size={size} is below 1; give at least 1, or leave it out")
    runtime = _section(hydra, "runtime")
    for source in runtime.get("config_sources") or ():
        if source["schema"] == "file" and not os.path.isdir(source["path"]):
            raise ConfigError(
                f"hydra.searchpath names '{source['path']}', which is not a folder; give the folder of your"
                " own groups, with --config-dir"
            )
    for group, option in _section(runtime, "choices").items():
        if _leads_out(option):
            raise ConfigError(
                f"{group}={option} is a path, not the name of an option; put the file into a folder <group>/"
                " of your own, name its parent with --config-dir, and choose it by its name"
            )


def _check_is_below(name: str, value: Any, folder: str) -> None:
    """Refuse a folder that is not below another one.

    Raises:
        ConfigError: it is not.
    """
    if _leads_out(value):
        raise ConfigError(f"{name}={value} leads out of {folder}; give the name of a folder in it")


def _leads_out(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    path = PurePosixPath(value)
    return path.is_absolute() or ".." in path.parts


def _section(value: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = value.get(name)
    return found if isinstance(found, Mapping) else {}
