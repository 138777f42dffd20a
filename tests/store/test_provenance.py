"""Which commit a manifest records: that of heapr's own code, and of no repository around it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from heapr.store import manifest
from heapr.store.manifest import _git_commit as git_commit  # before tests/store/conftest.py exchanges it


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_a_commit_is_recorded_only_if_git_tracks_heapr(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A repository may hold the virtual environment in which heapr is installed."""
    project = tmp_path / "project"
    package = project / "venv" / "heapr"
    package.mkdir(parents=True)
    (package / "manifest.py").touch()
    monkeypatch.setattr(manifest, "__file__", str(package / "manifest.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    assert git_commit() is None  # no repository
    git(project, "init", "--quiet")
    git(project, "add", "venv")
    assert git_commit() is None  # one without a commit
    git(project, "rm", "--quiet", "--cached", "-r", "venv")
    git(project, "commit", "--quiet", "--allow-empty", "--message", "theirs")
    assert git_commit() is None  # somebody else's
    git(project, "add", "venv")
    git(project, "commit", "--quiet", "--message", "heapr's")
    assert git_commit() == git(project, "rev-parse", "HEAD")
    monkeypatch.setenv("PATH", "")
    assert git_commit() is None  # git is not installed


@pytest.mark.parametrize("wrong", [3, None, {}, {"size": -1, "sha256": "0" * 64}, {"size": 1, "sha256": "0"}])
def test_what_a_file_will_be_next_is_described_like_what_it_is(wrong: object) -> None:
    """A card that is being rewritten has two descriptions for a moment, and either must be one."""
    right = {"size": 1, "sha256": "0" * 64}
    assert manifest._describes_a_file({**right, "next": right})
    assert not manifest._describes_a_file({**right, "next": wrong})
    assert not manifest._describes_a_file(wrong)
