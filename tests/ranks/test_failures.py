"""A rank that fails ends the others with one line, and the store stays intact."""

from __future__ import annotations

import shutil
import socket
import time
from pathlib import Path

import pytest

from heapr import rank_environment
from heapr.errors import ConfigError
from heapr.main import options_of_rank
from heapr.rank_environment import Place, first_host, place_of
from heapr.ranks import ONE_PROCESS, Ranks
from heapr.start_ranks import started_ranks
from tests.ranks import failing
from tests.ranks.processes import ROOT, Started, finish, start


def run_failing(folder: Path, how: str, *, size: int = 3) -> tuple[list[int], list[str]]:
    """Exit codes, and the lines that begin with "error:", of all ranks."""
    return ends_of(start(size, failing.main, folder, how))


def ends_of(started: list[Started]) -> tuple[list[int], list[str]]:
    """Exit codes, and the lines that begin with "error:", of all ranks."""
    ended = finish(started, 60)
    lines = [line for _, text in ended for line in text.splitlines() if line.startswith("error:")]
    return [code for code, _ in ended], lines


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "error"),
    [
        ("raises", "ValueError: this rank has had enough"),
        ("killed", "ended without a word: killed, out of memory"),
    ],
)
def test_a_rank_that_fails_ends_the_others_and_leaves_the_store_intact(
    how: str, error: str, tmp_path: Path
) -> None:
    codes, lines = run_failing(tmp_path, how)
    failed = tmp_path / failing.FAILED
    assert time.time() - failed.stat().st_mtime < 30
    assert all(code != 0 for code in codes)
    (line,) = lines
    assert line.startswith("error: rank 1 on ") and error in line
    assert not [*tmp_path.glob("made/[!.]*")]
    if how == "killed":
        codes, lines = run_failing(tmp_path, "nobody")
        assert (codes, lines) == ([0, 0, 0], [])
        (found,) = tmp_path.glob("made/*/found.txt")
        numbers = "[[0, 0.1], [1, 0.1], [2, 0.1]]"
        assert found.read_text() == f"3 {numbers} ['a', 'b', 'c', 'd', 'e']"
        assert not [*tmp_path.glob("made/.*tmp*")]


@pytest.mark.slow
def test_ranks_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    codes, lines = run_failing(tmp_path, "other")
    assert codes == [2, 2, 2]
    # All find it; whoever is first is heard.
    (line,) = lines
    assert "rank 2 has another configuration than rank 0: pruning.ratio is 0.5 and not 0.25; start" in line


@pytest.mark.slow
def test_ranks_with_other_code_are_refused(tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(ROOT / "heapr", other, ignore=shutil.ignore_patterns("__pycache__", "builtin"))
    with (other / "score" / "gradient.py").open("a") as file:
        file.write("# an edit that the other machine does not have yet\n")
    codes, (line,) = ends_of(start(2, failing.main_of_other_code, tmp_path / "store", other))
    assert codes == [2, 2]
    assert "rank 1 has another version than rank 0: heapr is '" in line
    assert "start all with the same command and the same code" in line


@pytest.mark.slow
def test_a_folder_that_a_rank_does_not_see_is_refused(tmp_path: Path) -> None:
    codes, (line,) = run_failing(tmp_path, "blind", size=2)
    assert codes == [2, 2]
    assert line.startswith("error: rank 1 on ") and "cannot see" in line


def test_a_sweep_is_for_one_process() -> None:
    several = Ranks()
    several.size, several.rank = 2, 1
    assert options_of_rank(ONE_PROCESS, ["-m"]) == []
    assert "hydra.run.dir=." in options_of_rank(several, [])
    with pytest.raises(ConfigError, match="2 processes cannot share the jobs of run.py -m"):
        options_of_rank(several, ["pruning.ratio=0.1,0.2", "--multirun"])


def test_a_port_in_use_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        meeting = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        for name, value in meeting.items():
            monkeypatch.setenv(name, value)
        problem = f"rank 0 cannot listen on port {port} .*; give a free one"
        with pytest.raises(ConfigError, match=problem), started_ranks():
            pass


def test_where_torchrun_and_srun_put_a_process() -> None:
    torchrun = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "29500"}
    assert place_of(torchrun) == Place(5, 8, 1, "a", 29500)
    slurm = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "1000"}
    nodes = {"SLURM_STEP_NODELIST": "gpu[007-009,12],cpu1", "SLURM_STEP_ID": "2"}
    assert place_of(slurm | nodes) == Place(3, 4, 1, "gpu007", rank_environment.FIRST_PORT + 7002)
    assert place_of(torchrun | slurm | nodes) == Place(5, 8, 1, "a", 29500)
    # One process: alone, one task of srun, and a batch script of a job with many tasks.
    assert place_of({}) is None
    assert place_of({"WORLD_SIZE": "1"}) is None
    assert place_of({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}) is None
    assert place_of({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}) is None


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("n1", "n1"), ("n1,n2", "n1"), ("n[3-4]", "n3"), ("n[03,05]-ib,x", "n03-ib"), ("", "")],
)
def test_the_first_host_of_a_node_list(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"WORLD_SIZE": "2"},
            "WORLD_SIZE=2, but there is no RANK and no MASTER_ADDR and no MASTER_PORT; start",
        ),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two' in the environment is not a number"),
        (
            {"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
            "RANK=2 is not below WORLD_SIZE=2",
        ),
        (
            {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"},
            "there is no SLURM_STEP_NODELIST; set MASTER_ADDR",
        ),
    ],
)
def test_an_environment_without_a_meeting_point_is_refused(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        place_of(environment)
