"""Locks and GPU slots, with real processes: exclusion, the holder's name, dead holders, file systems without flock."""

from __future__ import annotations

import errno
import fcntl
import logging
import multiprocessing
import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from pathlib import Path

import pytest
import torch

from heapr.errors import ConfigError
from heapr.gpu_slots import gpu_slot, one_of
from heapr.locks import holder_of, locked

FORK = multiprocessing.get_context("fork")
SOON = 0.005  # minutes


@contextmanager
def other_process(action: Callable[[Connection], None]) -> Iterator[tuple[ForkProcess, Connection]]:
    """A process that says when it holds what it came for and lets go when told; and the way to tell it."""
    here, there = FORK.Pipe()
    process = FORK.Process(target=action, args=(there,))
    process.start()
    assert here.poll(30)
    try:
        yield process, here
    finally:
        with suppress(OSError):  # it was killed
            here.send("let go")
        process.join(30)


def holding(path: Path) -> Callable[[Connection], None]:
    def action(there: Connection) -> None:
        with locked(path, "it"):
            there.send("holds")
            there.poll(30)

    return action


def test_who_waits_is_told_who_holds_the_lock_and_since_when(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / ".lock"
    with other_process(holding(path)) as (other, _), caplog.at_level(logging.INFO, logger="heapr"):
        with pytest.raises(ConfigError) as refusal, locked(path, "score 17", wait_minutes=SOON):
            pass
        holder = rf"process {other.pid} of \S+ on {re.escape(socket.gethostname())}, since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d"
        assert re.search(rf"score 17 is still locked by {holder}", str(refusal.value))
        assert f"or remove '{path}' if that process is gone" in str(refusal.value)
        assert re.search(rf"score 17: waiting for {holder}", caplog.text)
    with locked(path, "score 17", wait_minutes=SOON):
        holder_now = holder_of(path)
        assert holder_now is not None and holder_now.pid == os.getpid()
    assert holder_of(path) is None


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with other_process(holding(path)) as (other, _):
        other.kill()
        other.join()
        with locked(path, "it", wait_minutes=0.2):
            holder = holder_of(path)
            assert holder is not None and holder.pid == os.getpid()


@pytest.fixture
def without_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that does not implement flock, as Lustre without its mount option."""

    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.usefixtures("without_flock")
@pytest.mark.filterwarnings("ignore:.*flock.*")
def test_without_flock_processes_exclude_each_other_and_the_dead_are_noticed(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with other_process(holding(path)) as (other, _):
        with pytest.raises(ConfigError, match=f"process {other.pid} "), locked(path, "it", wait_minutes=SOON):
            pass
        other.kill()
        other.join()
        with locked(path, "it", wait_minutes=0.5):
            assert holder_of(path) is not None


def test_every_process_gets_a_thing_of_its_own(tmp_path: Path) -> None:
    names = ["a", "b"]

    def take(there: Connection) -> None:
        with one_of(names, tmp_path) as number:
            (tmp_path / f"got{os.getpid()}").write_text(str(number))
            there.send("holds")
            there.poll(30)

    with other_process(take) as (first, _), other_process(take) as (second, to_second):
        assert [(tmp_path / f"got{pid}").read_text() for pid in (first.pid, second.pid)] == ["0", "1"]
        with pytest.raises(ConfigError) as refusal, one_of(names, tmp_path, wait_minutes=0):
            pass
        assert re.match(
            rf"no GPU is free .*: a by process {first.pid} .*; b by process {second.pid} ", str(refusal.value)
        )
        to_second.send("let go")
        with one_of(names, tmp_path, wait_minutes=0.5) as number:
            assert number == 1


def test_a_gpu_is_known_by_its_uuid_and_becomes_the_current_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two GPUs that are not there: the first is held by another process, so a run on `cuda` gets the second."""

    class Properties:
        def __init__(self, index: int) -> None:
            self.uuid = f"uuid-{index}"

    current: list[int] = []
    monkeypatch.setattr("heapr.gpu_slots.slots_folder", lambda: tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", Properties)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    cuda = torch.device("cuda")
    with other_process(holding(tmp_path / "uuid-0")):
        with gpu_slot(cuda, all_of_them=False, wait_minutes=0):
            assert current == [1]
            assert holder_of(tmp_path / "uuid-1") is not None
        of_one = gpu_slot(torch.device("cuda:0"), all_of_them=False, wait_minutes=0)
        with pytest.raises(ConfigError, match="no GPU is free"), of_one:
            pass
        of_all = gpu_slot(cuda, all_of_them=True, wait_minutes=SOON)
        with pytest.raises(ConfigError, match="GPU uuid-0 is still locked"), of_all:
            pass
    with gpu_slot(torch.device("cpu"), all_of_them=False, wait_minutes=0):
        assert current == [1]


def a_folder(path: Path) -> None:
    (path / "in the way").mkdir(parents=True)


def a_link(path: Path) -> None:
    path.symlink_to(path.with_name("nowhere"))


@pytest.mark.parametrize("make", [a_folder, a_link])
def test_what_is_in_the_place_of_a_lock_is_moved_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, make: Callable[[Path], None]
) -> None:
    path = tmp_path / ".lock"
    make(path)
    with locked(path, "it", wait_minutes=SOON):
        assert path.is_file()
    assert len(list(tmp_path.glob(".lock.damaged-*"))) == 1 and "is no lock" in caplog.text


@pytest.mark.parametrize("content", [b"\xff", b"[]", b"{}", b'{"host": 1}', b"[" * 100_000])
def test_a_damaged_name_of_a_holder_is_nobody(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / ".lock"
    path.with_name(".lock.holder").write_bytes(content)
    assert holder_of(path) is None
    with locked(path, "it", wait_minutes=SOON):
        assert holder_of(path) is not None
