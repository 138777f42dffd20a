"""Composes the configuration of an experiment as the command line does, for whoever is not the command line.

In: overrides and the folder conf/. Out: the checked `ExperimentConfig`. No torch here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir

from heapr.overrides import check_one_option
from heapr.schema import ExperimentConfig, register, resolve


def compose_experiment(overrides: Sequence[str], config_folder: Path) -> ExperimentConfig:
    """The checked configuration of `python run.py <overrides>`.

    Raises:
        ConfigError, HydraException: the overrides are wrong.
    """
    register()
    check_one_option(overrides)
    with initialize_config_dir(str(config_folder), version_base="1.3"):
        return resolve(compose("config", overrides=list(overrides)))
