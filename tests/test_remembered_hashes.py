"""Remembered hashes: read once, never believed for other content, for long, or from a damaged record."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from heapr import remembered_hashes
from heapr.files import hash_file
from heapr.remembered_hashes import BELIEVED_DAYS, hash_file_once
from heapr.sealed import read_sealed, sealed_text


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that was not changed just now."""
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    monkeypatch.setattr(remembered_hashes, "SETTLED_SECONDS", -1.0)
    return path


@pytest.fixture
def times_read(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Files that were read to the end."""
    read: list[Path] = []

    def counted(path: Path) -> str:
        read.append(path)
        return hash_file(path)

    monkeypatch.setattr(remembered_hashes, "hash_file", counted)
    return read


def test_a_file_is_read_once(tmp_path: Path, file: Path, times_read: list[Path]) -> None:
    memory = tmp_path / "digests"
    assert [hash_file_once(file, memory) for _ in range(3)] == [hash_file(file)] * 3
    assert len(times_read) == 1 and len(list(memory.iterdir())) == 1


def rewritten_in_place(file: Path) -> None:
    file.write_bytes(b"two")


def replaced(file: Path) -> None:
    other = file.with_name("other")
    other.write_bytes(b"two")
    os.replace(other, file)


@pytest.mark.parametrize("change", [rewritten_in_place, replaced])
def test_equal_size_and_restored_time_do_not_deceive(
    tmp_path: Path, file: Path, change: Callable[[Path], None]
) -> None:
    os.utime(file, ns=(1, 1))
    before = hash_file_once(file, tmp_path / "digests")
    time.sleep(0.02)  # the clock of file systems ticks slowly
    change(file)
    os.utime(file, ns=(1, 1))
    assert hash_file_once(file, tmp_path / "digests") == hash_file(file) != before


def test_a_file_that_may_still_be_changing_is_not_remembered(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remembered_hashes, "SETTLED_SECONDS", 2.0)
    assert hash_file_once(file, tmp_path / "digests") == hash_file(file)
    assert not (tmp_path / "digests").exists()


@pytest.mark.parametrize("days", [BELIEVED_DAYS + 1, -1])
def test_an_old_hash_and_one_from_the_future_are_checked(
    tmp_path: Path, file: Path, times_read: list[Path], monkeypatch: pytest.MonkeyPatch, days: int
) -> None:
    hash_file_once(file, tmp_path / "digests")
    later = time.time() + days * 24 * 3600
    monkeypatch.setattr(remembered_hashes.time, "time", lambda: later)
    hash_file_once(file, tmp_path / "digests")
    assert len(times_read) == 2


@pytest.mark.parametrize("content", [b"", b"null", b"[]", b"\xff", b'{"sha256": "0"}', b"[" * 100_000])
def test_a_damaged_record_is_read_over(tmp_path: Path, file: Path, content: bytes) -> None:
    memory = tmp_path / "digests"
    expected = hash_file_once(file, memory)
    (record,) = memory.iterdir()
    edited = json.loads(record.read_text()) | {"sha256": "0" * 64}
    for text in (content, json.dumps(edited, indent=2).encode()):
        record.write_bytes(text)
        assert hash_file_once(file, memory) == expected


@pytest.mark.parametrize("change", [{"time": 10**400}, {"time": "now"}, {"sha256": 7}, {"state": None}])
def test_a_record_that_cannot_be_is_read_over(tmp_path: Path, file: Path, change: dict[str, object]) -> None:
    """However well it is sealed."""
    memory = tmp_path / "digests"
    expected = hash_file_once(file, memory)
    (record,) = memory.iterdir()
    record.write_text(sealed_text(read_sealed(record) | change))
    assert hash_file_once(file, memory) == expected
    record.unlink()
    os.mkfifo(record)
    assert hash_file_once(file, memory) == expected


def test_where_nothing_can_be_remembered_the_file_is_read(tmp_path: Path, file: Path) -> None:
    (tmp_path / "digests").write_text("a file in place of the folder")
    assert hash_file_once(file, tmp_path / "digests") == hash_file(file)
    (tmp_path / "more").mkdir()
    name = hash_record_name(file)
    (tmp_path / "more" / name).mkdir()
    assert hash_file_once(file, tmp_path / "more") == hash_file(file)


def hash_record_name(file: Path) -> str:
    import hashlib

    return hashlib.sha256(str(file.resolve()).encode()).hexdigest() + ".json"
