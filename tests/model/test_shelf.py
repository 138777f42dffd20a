"""Tensors in files: there again after a crash, for the same work alone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from heapr.model.shelf import JOURNAL, Files, Memory

ABOUT = {"key": "abc", "spans": [[0, 1]]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_what_is_put_is_what_is_got(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = (torch.arange(6).view(2, 3) % 2).to(dtype)
    files = Files(tmp_path, ABOUT)
    assert torch.equal(files.put("a", tensor), tensor) and files.get("a").dtype == dtype
    assert torch.equal(files.put("strided", tensor.T), tensor.T)
    assert files.put("empty", torch.empty(0, 3)).shape == (0, 3)
    assert torch.equal(Memory().put("a", tensor), tensor)


def test_a_graph_does_not_stay() -> None:
    assert not Memory().put("a", torch.ones(1, requires_grad=True) * 2).requires_grad


def test_what_was_recorded_is_there_again_and_nothing_else(tmp_path: Path) -> None:
    files = Files(tmp_path, ABOUT)
    kept = files.put("kept", torch.arange(3.0))
    files.put("dropped", torch.ones(1))
    files.commit(layer=1, losses=[0.5])
    files.drop("dropped")
    files.put("later", torch.ones(2))  # and killed
    again = Files(tmp_path, ABOUT)
    assert sorted(again) == ["dropped", "kept"] and again.state == {"layer": 1, "losses": [0.5]}
    assert torch.equal(again.get("kept"), kept) and not (tmp_path / "later").exists()
    again.drop("dropped")
    again.commit()
    assert not (tmp_path / "dropped").exists() and sorted(Files(tmp_path, ABOUT)) == ["kept"]


def test_other_work_and_damaged_files_are_not_used(tmp_path: Path) -> None:
    files = Files(tmp_path, ABOUT)
    files.put("a", torch.arange(3.0))
    files.commit(layer=1)
    (tmp_path / "a").write_bytes(b"\0" * 12)
    assert not list(Files(tmp_path, ABOUT)) and not list(tmp_path.iterdir())
    files = Files(tmp_path, ABOUT)
    files.put("a", torch.arange(3.0))
    files.commit(layer=1)
    other = Files(tmp_path, ABOUT | {"key": "def"})
    assert not list(other) and other.state == {} and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "content", ["another loss", b"", b"null", b"[]", b"[" * 100_000, b"\xff", "folder", "pipe"]
)
def test_a_damaged_journal_is_told_and_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str | bytes
) -> None:
    """Not even if a single digit is different."""
    files = Files(tmp_path, ABOUT)
    files.put("a", torch.arange(3.0))
    files.commit(loss=1.5)
    journal = tmp_path / JOURNAL
    text = journal.read_text()
    journal.unlink()
    if content == "folder":
        (journal / "inside").mkdir(parents=True)
    elif content == "pipe":
        os.mkfifo(journal)
    else:
        journal.write_bytes(content if isinstance(content, bytes) else text.replace("1.5", "2.5").encode())
    again = Files(tmp_path, ABOUT)
    assert not list(again) and again.state == {} and not list(tmp_path.iterdir())
    assert "is damaged" in caplog.text and len(caplog.records) == 1


@pytest.mark.parametrize("kind", ["file", "link"])
def test_what_is_in_the_place_of_its_folder_is_removed(tmp_path: Path, kind: str) -> None:
    """A link, and not what it points to; and folders in it."""
    folder, elsewhere = tmp_path / "files", tmp_path / "elsewhere"
    Files(elsewhere, ABOUT).put("theirs", torch.ones(1))
    if kind == "file":
        folder.write_text("x")
    else:
        folder.symlink_to(elsewhere)
    files = Files(folder, ABOUT)
    files.put("mine", torch.ones(1))
    files.commit(layer=1)
    (folder / "sub").mkdir()
    assert list(Files(folder, ABOUT)) == ["mine"] and not (folder / "sub").exists()
    assert not folder.is_symlink() and (elsewhere / "theirs").is_file()
