"""Refuses operations on files, one after the other, while a store makes something."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from heapr import files
from heapr.errors import ConfigError
from heapr.store import Store, manifest, publishing
from tests.store.mutations import CPU, STEPS, Made, nothing

OPERATIONS = [
    (os, "open"), (os, "rename"), (os, "replace"), (os, "mkdir"), (os, "fsync"), (Path, "write_text"),
    (Path, "open"), (Path, "chmod"), (publishing, "fsync"), (manifest, "fsync"), (files, "fsync"),
    (shutil, "copy"),
]  # fmt: skip


class Refusing:
    """Refuses one operation on files: the one with a given number.

    Args:
        turn: its number, from 1 on.
        error: what is raised in its place.
    """

    def __init__(self, turn: int, error: OSError) -> None:
        self.left, self.error = turn, error

    def in_place_of(self, function: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            self.left -= 1
            if self.left == 0:
                raise self.error
            return function(*args, **kwargs)

        return call


def get(store: Store, step: Made) -> None:
    store.get(step.origin, nothing, step.write, step.part)


def check_refusals(folder: Path, number: int, step: Made, *, every: int = 1) -> None:
    """Refuse each operation on files in turn; check that it is one line, and that all goes on from there.

    Args:
        folder: for stores.
        number: of the operating system's error.
        step: what is made, when calibration, scores and plan are there.
        every: so many operations one is refused.
    """
    half = Store(folder / "half", CPU)
    for earlier in STEPS[:3]:
        get(half, earlier)
    for turn in range(1, 200, every):
        root = shutil.copytree(half.root, folder / str(turn))
        refusing = Refusing(turn, OSError(number, os.strerror(number), str(root / "file")))
        line = ""  # it stays empty if the operation is not needed, such as writing the lock holder's name
        with pytest.MonkeyPatch.context() as patch:
            for owner, name in OPERATIONS:
                patch.setattr(owner, name, refusing.in_place_of(getattr(owner, name)))
            try:
                get(Store(root, CPU), step)
            except ConfigError as error:
                line = str(error)
        if refusing.left > 0:
            break  # it had fewer operations
        assert "\n" not in line, turn
        fresh = Store(root, CPU)
        assert all(fresh.has(done.origin) for done in STEPS[:3]), turn
        get(fresh, step)
        assert fresh.has(step.origin, step.part), turn
        shutil.rmtree(root)
    assert 15 < turn < 190
