"""Runs the jobs of a sweep through Hydra's multirun.

In: jobs and a folder. Out: one subfolder per job. The jobs run in a separate process, as with
`python run.py -m`, so every launcher works: one job after the other, joblib, submitit.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from heapr.sweep.collect import RECORD, Record

INTERRUPTED = 130  # a shell's exit code for an interrupted command


def new_folder(sweeps: Path, record: Record) -> Path:
    """Create a folder for a sweep, with its record, and return it."""
    folder = sweeps / f"{datetime.now():%Y-%m-%d_%H-%M-%S-%f}_{record.experiment}_{record.version}"
    folder.mkdir(parents=True)
    record.write(folder)
    return folder


def launch(root: Path, folder: Path, settings: Sequence[str]) -> int:
    """Run all jobs and wait for them.

    Args:
        root: holds run.py.
        folder: of the sweep.
        settings: overrides of Hydra itself, such as its launcher.

    Returns:
        The exit code; 0 even if jobs failed, because every job records its failure in its own folder.
    """
    chosen = [
        "hydra/sweeper=jobs",
        f"hydra.sweeper.file={_quoted(folder / RECORD)}",
        f"hydra.sweep.dir={_quoted(folder)}",
    ]
    command = [sys.executable, str(root / "run.py"), "--multirun", *chosen, *settings]
    try:
        return subprocess.run(command, check=False).returncode
    except KeyboardInterrupt:
        # The jobs were interrupted, too.
        return INTERRUPTED


def _quoted(path: Path) -> str:
    """Quote a path so that Hydra reads any characters in it as they are."""
    text = str(path.resolve()).replace("'", "\\'")
    return f"'{text}'"
