"""A store of all stages, killed with SIGKILL before each of its operations on files in turn."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from heapr.store import Store, manifest, publishing
from heapr.store.inventory import entries
from heapr.store.verify import Hashes, verify
from tests.faults.disturbed import leftovers
from tests.store.mutations import CPU, damaged_copies, data_of, nothing, tiny_steps
from tests.store.refusals import OPERATIONS

OTHERS = [(os, "rmdir"), (os, "unlink"), (Path, "unlink"), (publishing, "describe")]

pytestmark = pytest.mark.faults


def make_all(root: Path) -> None:
    """Go through the steps of one experiment."""
    store = Store(root, CPU)
    for step in tiny_steps(0):
        store.get(step.origin, nothing, step.write, step.part)


def make_until(root: Path, turn: int) -> None:
    """Go through all steps, and be killed before the operation of this number; exit code 0 if there are fewer."""
    left = turn

    def counted(function: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for owner, name in [*OPERATIONS, *OTHERS]:
        setattr(owner, name, counted(getattr(owner, name)))
    make_all(root)


def test_a_kill_before_any_operation_on_files_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one experiment with a plan of two parts."""
    monkeypatch.setattr(manifest, "_git_commit", lambda: None)  # a process for every artifact
    make_all(tmp_path / "expected")
    expected = data_of(tmp_path / "expected")
    context = multiprocessing.get_context("fork")
    turn, num_kills = 0, 0
    while True:
        turn += 1
        root = tmp_path / "store"
        shutil.rmtree(root, ignore_errors=True)
        process = context.Process(target=make_until, args=(root, turn))
        process.start()
        process.join(60)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL, turn
        num_kills += 1
        for entry in entries(root):
            assert entry.manifest is not None, (turn, entry)
            for part in ["", *entry.parts]:
                verify(entry.path, part, Hashes(None))
        make_all(root)
        assert data_of(root) == expected, turn
        assert not damaged_copies(root), turn
        assert not leftovers(root), turn
    print(f"{num_kills} kills before an operation on files survived")  # noqa: T201
    assert num_kills > 200
