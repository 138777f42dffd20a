"""Tensors in files: there again after a crash, for the same work alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from heapr.model.shelf import Files, Memory

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
