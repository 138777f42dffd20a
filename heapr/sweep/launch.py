"""Runs the jobs of a sweep through Hydra's multirun.

In: jobs and a folder. Out: the folder filled, one subfolder per job. The process of its own is what `python
run.py -m` would be: launchers (one job after the other, joblib, submitit) see nothing unusual.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from heapr.sweep.collect import RECORD, Record

INTERRUPTED = 130  # a shell's exit code of what was interrupted


def new_folder(sweeps: Path, record: Record) -> Path:
    """An empty folder for a sweep, with its record."""
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
        the exit code; 0 even if jobs failed, because each says so in its own folder.
    """
    chosen = [
        "hydra/sweeper=jobs",
        f"hydra.sweeper.file={_quoted(folder / RECORD)}",
        f"hydra.sweep.dir={_quoted(folder)}",
    ]
    command = [sys.executable, str(root / "run.py"), "--multirun", *chosen, *settings]
    try:
        return subprocess.run(command, check=False).returncode
    except KeyboardInterrupt:  # the jobs got it, too
        return INTERRUPTED


def _quoted(path: Path) -> str:
    """As Hydra reads a value, whatever characters it holds."""
    text = str(path.resolve()).replace("'", "\\'")
    return f"'{text}'"
