"""What stands between the command line and the pipeline: one line for the user's mistakes, and the final table.

In: the configuration that Hydra composed, or the error that it met. Out: a run, or one line on stderr and exit code 2.
"""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from heapr.errors import ConfigError
from heapr.schema import resolve, unknown_key

EXIT_CODE = 2
CANNOT_WRITE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOSPC)


def run_job(config: DictConfig) -> None:
    """One job of Hydra's. In a sweep a mistake fails its job and Hydra goes on with the others."""
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        _run(config)
        return
    with one_line_errors():  # before Hydra adds a line of its own
        _run(config)


def _run(config: DictConfig) -> None:
    """Check the configuration, run the pipeline, print the table."""
    typed = resolve(config)  # before torch is imported: a mistake is answered at once
    from dataclasses import asdict

    from heapr.pipeline import run
    from heapr.report.console import print_summary

    folder = Path(HydraConfig.get().runtime.output_dir)
    summary = run(typed, folder)
    print_summary(asdict(summary), str(folder))


@contextmanager
def one_line_errors(config_folder: Path | None = None) -> Iterator[None]:
    """Turn a user's mistake into one line and exit code 2; anything else is our bug and keeps its stack trace.

    Args:
        config_folder: where known keys are looked up when one is misspelt.
    """
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # otherwise Hydra prints errors itself and exits with 1
    try:
        yield
    except ConfigError as error:
        _stop(str(error))
    except FloatingPointError as error:
        _stop(str(error), code=1)
    except (HydraException, OmegaConfBaseException) as error:
        _stop(_explain(error, config_folder))
    except OSError as error:
        if error.errno not in CANNOT_WRITE or error.filename is None:
            raise
        _stop(f"cannot write '{error.filename}': {error.strerror}; choose another folder with paths.outputs=...")


def _stop(message: str, code: int = EXIT_CODE) -> None:
    sys.stderr.write(f"error: {message}\n")
    sys.exit(code)


def _explain(error: Exception, config_folder: Path | None) -> str:
    """Hydra's message, or a better one where a key is misspelt or a value has the wrong type."""
    text = str(error).strip()
    match = re.match(r"Could not override '([^']+)'", text)
    if match and "To append to your config" in text and config_folder is not None:
        return _explain_unknown_key(match.group(1), config_folder)
    if text.startswith("Error merging override") and error.__cause__ is not None:
        reason = str(error.__cause__).split("\n", 1)[0]
        return f"{text.removeprefix('Error merging override ')}: {reason}; give a value of the field's type (heapr/schema.py)"
    return text


def _explain_unknown_key(path: str, config_folder: Path) -> str:
    """Compare a misspelt key, part by part, with the default configuration."""
    from hydra import compose, initialize_config_dir

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_folder), version_base="1.3"):
        node = compose("config")
    parts = path.split(".")
    for number, part in enumerate(parts, start=1):
        if not isinstance(node, DictConfig) or part not in node:
            known = [str(key) for key in node] if isinstance(node, DictConfig) else []
            return unknown_key(".".join(parts[:number]), known)
        node = node[part]
    return f"'{path}' is a group of fields, not one; give one of its fields"
