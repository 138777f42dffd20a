"""Where conf/ and experiments/ are: in the package if it was installed, in the repository otherwise.

In: nothing. Out: folders, and how the commands are called there.
"""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
CONF, EXPERIMENTS = "conf", "experiments"


def is_installed() -> bool:
    """Whether the package was installed from a wheel, into which pyproject.toml puts both folders."""
    return (PACKAGE / CONF).is_dir()


def definitions_folder() -> Path:
    """The folder of conf/ and experiments/."""
    return PACKAGE if is_installed() else PACKAGE.parent


def conf_folder() -> Path:
    """The folder of the configuration groups."""
    return definitions_folder() / CONF


def import_folder() -> Path:
    """The folder in which Python finds heapr and hydra_plugins."""
    return PACKAGE.parent


def run_command() -> str:
    """How a single run is started."""
    return "heapr" if is_installed() else "python run.py"


def sweep_command() -> str:
    """How an experiment is started."""
    return "heapr-sweep" if is_installed() else "python sweep.py"
