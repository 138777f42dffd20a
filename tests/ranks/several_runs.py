"""Experiments that all ranks run one after the other, in one of which a rank may be killed."""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from heapr.model.shelf import Files
from heapr.one_line_errors import one_line_errors
from heapr.pruning.repaired import RepairedLayers
from heapr.run_experiment import run
from heapr.start_ranks import started_ranks
from tests.experiment import compose_experiment


class Kill(NamedTuple):
    """When rank 1 is killed: in an experiment, when it has recorded finished work so many times."""

    name: str
    where: str
    times: int


RECORDS: dict[str, tuple[type, str]] = {"memory": (RepairedLayers, "add"), "files": (Files, "commit")}


def main(folder: Path, experiments: dict[str, list[str]], kill: Kill | None = None) -> None:
    """Run experiments in folders of their names."""
    with one_line_errors(), started_ranks() as ranks:
        records = counted(Files, "commit")
        for name, options in experiments.items():
            run_folder = folder / name / f"run-{ranks.rank}"
            run_folder.mkdir(parents=True, exist_ok=True)
            outputs = f"paths.outputs={folder / name / 'outputs'}"
            config = compose_experiment("tracking=none", outputs, *options)
            if kill is not None and kill.name == name and ranks.rank == 1:
                counted(*RECORDS[kill.where], fatal=kill.times)
            before = len(records)
            summary = run(config, run_folder, ranks=ranks)
            found = {"metrics": asdict(summary)["metrics"], "records": len(records) - before}
            (folder / name / f"rank-{ranks.rank}.json").write_text(json.dumps(found))


def command(arguments: list[str]) -> None:
    """`python run.py <arguments>`, as torchrun starts it."""
    sys.argv = ["run.py", *arguments]
    runpy.run_path("run.py", run_name="__main__")


def counted(kind: type, method: str, *, fatal: int | None = None) -> list[None]:
    """Let a class count how often a method has returned, in the list that this returns; kill this process at
    the fatal time."""
    original: Callable[..., Any] = getattr(kind, method)
    calls: list[None] = []

    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        found = original(self, *arguments, **options)
        calls.append(None)
        if len(calls) == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    setattr(kind, method, call)
    return calls
