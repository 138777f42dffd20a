"""Readers meanwhile: artifacts are published, replaced and rewritten under their eyes."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch

from heapr.artifacts import MANIFEST
from heapr.errors import ConfigError
from heapr.origin import Origin
from heapr.sealed import DamagedError, read_sealed, sealed_text
from heapr.store import Store, publishing
from heapr.store.manifest import MissingError
from heapr.store.verify import Hashes, verify

CPU = torch.device("cpu")
ORIGIN = Origin("made", 1, {"x": 1}, {})


def nothing() -> None:
    """The value of an artifact whose files hold nothing of it."""


def write(folder: Path, _: None = None) -> None:
    (folder / "data.txt").write_text("data")


def write_card(folder: Path, _: None = None) -> None:
    (folder / "checkpoint").mkdir()
    (folder / "checkpoint" / "README.md").write_text("0")


@contextmanager
def busy(work: Callable[[], None]) -> Iterator[None]:
    """Another process that works all the time."""

    def again_and_again() -> None:
        while True:
            work()

    process = multiprocessing.get_context("fork").Process(target=again_and_again)
    process.start()
    try:
        yield
    finally:
        process.kill()
        process.join()


def test_readers_never_crash_while_an_artifact_is_damaged_and_replaced(tmp_path: Path) -> None:
    store = Store(tmp_path, CPU)
    path = store.get(ORIGIN, nothing, write).path
    chance = random.Random(0)

    def damage_and_replace() -> None:
        (path / "data.txt").write_text(chance.choice(["date", "longer data", ""]))
        Store(tmp_path, CPU).get(ORIGIN, nothing, write)

    read = 0
    with busy(damage_and_replace):
        end = time.monotonic() + 0.7
        while time.monotonic() < end:
            store.has(ORIGIN)
            store.get(ORIGIN, nothing, write)
            with suppress(ConfigError):  # the only error that readers know
                store.read(ORIGIN, lambda folder: (folder / "data.txt").read_text())
            read += 1
    assert read > 1


def test_a_part_is_intact_while_its_card_is_rewritten(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(tmp_path, CPU)
    store.get(ORIGIN, nothing, write)
    store.get(ORIGIN, nothing, write_card, "checkpoint")

    def rewrite() -> None:
        name = "checkpoint/README.md"
        Store(tmp_path, CPU).rewrite(ORIGIN, "checkpoint", name, lambda text: str(int(text) + 1))

    with busy(rewrite):
        end = time.monotonic() + 0.7
        while time.monotonic() < end:
            assert store.has(ORIGIN) and store.has(ORIGIN, "checkpoint")
    assert "damaged" not in caplog.text
    card = store.path(ORIGIN) / "checkpoint" / "README.md"
    assert int(card.read_text()) > 1


class Killed(BaseException):
    """In place of SIGKILL; nothing in the product catches it."""


def test_a_kill_at_any_moment_of_rewriting_leaves_the_old_card_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before each of the file operations in turn."""
    made = Store(tmp_path / "made", CPU)
    made.get(ORIGIN, nothing, write)
    made.get(ORIGIN, nothing, write_card, "checkpoint")
    number = 0
    while number < 50:
        number += 1
        root = shutil.copytree(tmp_path / "made", tmp_path / str(number))
        store = Store(root, CPU)
        left = number

        def counted(function: Callable[..., object]) -> Callable[..., object]:
            def call(*args: object, **kwargs: object) -> object:
                nonlocal left
                left -= 1
                if left == 0:
                    raise Killed
                return function(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(publishing.os, "replace", counted(os.replace))
            patch.setattr(publishing, "fsync", counted(publishing.fsync))
            patch.setattr(publishing, "describe", counted(publishing.describe))
            try:
                store.rewrite(ORIGIN, "checkpoint", "checkpoint/README.md", lambda _: "1")
            except Killed:
                pass
            else:
                break
        fresh = Store(root, CPU)
        assert fresh.has(ORIGIN) and fresh.has(ORIGIN, "checkpoint"), number
        assert (fresh.path(ORIGIN) / "checkpoint" / "README.md").read_text() in {"0", "1"}
        fresh.rewrite(ORIGIN, "checkpoint", "checkpoint/README.md", lambda _: "2")
        assert fresh.has(ORIGIN, "checkpoint")
    assert 6 < number < 50


def test_what_killed_processes_left_is_swept_by_the_next_that_makes_anything(tmp_path: Path) -> None:
    """Also of configurations that nobody asks for again."""
    store = Store(tmp_path, CPU)
    store.get(ORIGIN, nothing, write)
    folder = tmp_path / "made"
    (folder / ".0123456789abcdef.tmp-17").mkdir()
    (folder / ".0123456789abcdef.tmp-17" / "half").touch()
    (folder / ".0123456789abcdef.tmp-18-text").touch()
    (folder / f".{ORIGIN.key}.tmp-19-text").touch()
    holder = folder / "..0123456789abcdef.lock.holder.tmp-20"
    holder.touch()
    os.utime(holder, (1, 1))
    (folder / f".{ORIGIN.key}.scratch-whole").mkdir()  # of a process that was killed once it had published
    (folder / f".{ORIGIN.key}.scratch-checkpoint").mkdir()  # of a part that is not finished
    (folder / f".{ORIGIN.key}.lock.holder").touch()
    store.get(Origin("made", 1, {"x": 2}, {}), nothing, write)
    left = [path.name for path in folder.glob(".*") if path.suffix != ".lock"]
    assert left == [f".{ORIGIN.key}.scratch-checkpoint"]


def test_an_artifact_that_others_removed_meanwhile_is_one_line(tmp_path: Path) -> None:
    store = Store(tmp_path, CPU)
    path = store.get(ORIGIN, nothing, write).path

    def remove() -> None:
        (path / MANIFEST).unlink()
        (path / "data.txt").unlink()
        path.rmdir()

    with pytest.raises(ConfigError, match="was removed or damaged while the run needed it"):
        store.get(ORIGIN, remove, write_card, "checkpoint")
    with pytest.raises(ConfigError, match="was removed or damaged while the run needed it"):
        store.read(ORIGIN, lambda folder: (folder / "data.txt").read_text())


def test_a_key_answers_for_everything_that_a_manifest_says(tmp_path: Path) -> None:
    """Without a request too, as gc, verify and forecasts read them."""
    path = Store(tmp_path, CPU).get(ORIGIN, nothing, write).path
    verify(path, "", Hashes(None))
    manifest = read_sealed(path / MANIFEST)
    for name, value in {"config": {"x": 2}, "stage_version": 2, "upstream": {"made": "0"}}.items():
        (path / MANIFEST).write_text(sealed_text({**manifest, name: value}))
        with pytest.raises(DamagedError, match="belongs to another artifact"):
            verify(path, "", Hashes(None))
    with pytest.raises(MissingError):
        verify(path.with_name("0" * 16), "", Hashes(None))


def test_threads_of_one_process_share_nothing(tmp_path: Path) -> None:
    """Two stores in two threads exclude each other like two processes."""
    made: list[int] = []

    def make() -> None:
        Store(tmp_path, CPU).get(ORIGIN, lambda: made.append(1) or time.sleep(0.1), write)

    threads = [threading.Thread(target=make) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [1]


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/../data.txt", "/etc/passwd", "a\0b", "./data.txt", "a//b"]
)
def test_names_in_a_manifest_stay_inside_the_folder(tmp_path: Path, name: str) -> None:
    path = Store(tmp_path, CPU).get(ORIGIN, nothing, write).path
    manifest = read_sealed(path / MANIFEST)
    entry = manifest["files"]["data.txt"]
    (path / MANIFEST).write_text(sealed_text({**manifest, "files": {name: entry}}))
    with pytest.raises(DamagedError, match="cannot be"):
        verify(path, "", Hashes(None))
    (path / MANIFEST).write_text(sealed_text({**manifest, "files": {}}))
    with pytest.raises(DamagedError, match="names no files"):
        verify(path, "", Hashes(None))


def test_who_makes_a_part_does_not_wait_for_itself(tmp_path: Path) -> None:
    """It reads the artifact under the lock that it holds."""
    store = Store(tmp_path, CPU, wait_minutes=0.05)
    path = store.get(ORIGIN, nothing, write).path

    def compute() -> None:
        (path / "data.txt").unlink()
        store.read(ORIGIN, lambda folder: (folder / "data.txt").read_text())

    with pytest.raises(ConfigError, match="it was removed during the run; start again"):
        store.get(ORIGIN, compute, write_card, "checkpoint")
