"""The named points between the steps of the store's protocol and of what is saved on the way, at which a process
kills itself."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from typing import Any

from heapr import locks
from heapr.calibration.checkpoints import Checkpoints
from heapr.model import shelf
from heapr.pruning.repaired import RepairedLayers
from heapr.store import manifest as manifests
from heapr.store import publishing, store
from heapr.tensors_file import TensorsFile
from tests.faults.attempts import run_py

# By name: what is done there, and whether the process dies before or behind it.
POINTS: dict[str, tuple[Any, str, str]] = {
    "before a lock is taken": (store, "locked", "before"),
    "behind the holder's name": (locks, "write_json", "behind"),
    "behind a look for damage": (store.Store, "_put_damaged_aside", "behind"),
    "before leftovers are removed": (store, "remove_leftovers", "before"),
    "behind leftovers are removed": (store, "remove_leftovers", "behind"),
    "before a temporary folder is made": (store, "empty_folder", "before"),
    "behind a computed value": (store.Store, "_computed_by_all", "behind"),
    "behind a checkpoint of calibration": (Checkpoints, "save_if_due", "behind"),
    "inside a checkpoint of calibration": (shelf.Files, "put", "behind"),
    "before a journal is replaced": (shelf, "write_text", "before"),
    "behind a repaired layer": (RepairedLayers, "add", "behind"),
    "behind a tensor in its file": (TensorsFile, "write", "behind"),
    "before files are hashed": (store, "provenance", "before"),
    "behind hashed and forced files": (store, "provenance", "behind"),
    "behind a manifest in the temporary folder": (publishing, "sealed_text", "behind"),
    "before anything is forced to disk": (publishing, "fsync", "before"),
    "behind a published artifact": (store, "publish", "behind"),
    "behind a part's files are moved": (publishing, "write_manifest", "before"),
    "behind a part's entry": (store, "add_part", "behind"),
    "before a folder is removed": (store.shutil, "rmtree", "before"),
    "behind a removed folder": (store.shutil, "rmtree", "behind"),
    "before a card is rewritten": (store, "rewrite_text", "before"),
    "inside a card's rewriting": (publishing, "replace_text", "behind"),
    "behind a rewritten card": (store, "rewrite_text", "behind"),
    "behind the description of a file": (manifests, "describe", "behind"),
}


def killed_at(point: str, time: int, counts: str | None, arguments: Sequence[str]) -> None:
    """`python run.py <arguments>`, which kills itself when it passes a point for the given time.

    Args:
        point: one of `POINTS`; empty lets the run go on to its end.
        time: from 1 on.
        counts: file that gets how often each point was passed, if the run goes on to its end; else None.
        arguments: of run.py.
    """
    passed = dict.fromkeys(POINTS, 0)

    def pass_by(name: str) -> None:
        passed[name] += 1
        if name == point and passed[name] == time:
            os.kill(os.getpid(), signal.SIGKILL)

    for name, (owner, attribute, when) in POINTS.items():
        setattr(owner, attribute, _watched(getattr(owner, attribute), name, when, pass_by))
    try:
        run_py(arguments)
    finally:
        if counts is not None:
            lines = [f"{number} {name}\n" for name, number in passed.items()]
            with open(counts, "w") as file:
                file.writelines(lines)


def _watched(
    function: Callable[..., Any], name: str, when: str, pass_by: Callable[[str], None]
) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        if when == "before":
            pass_by(name)
        found = function(*arguments, **options)
        if when == "behind":
            pass_by(name)
        return found

    return call
