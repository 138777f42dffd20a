"""The artifact store: made once, verified, safe under parallel jobs and kill -9."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from heapr.store import Recipe, Store, canonical_json

CPU = torch.device("cpu")
RECIPE = Recipe(stage="score", version=1, config={"ratio": 0.5}, upstream={"calibrate": "abc"})


def make_file(folder: Path) -> None:
    (folder / "data.txt").write_text("result")


def make_slowly(root: str, log: str, seconds: float) -> None:
    def make(folder: Path) -> None:
        with Path(log).open("a") as file:
            file.write(f"made by {os.getpid()}\n")
        time.sleep(seconds)
        make_file(folder)

    Store(Path(root), CPU).get(RECIPE, make)


def forbidden(folder: Path) -> None:
    raise AssertionError("made again")


def test_made_once_then_cached(tmp_path: Path) -> None:
    store = Store(tmp_path, CPU)
    assert not store.has(RECIPE)
    first, second = store.get(RECIPE, make_file), store.get(RECIPE, forbidden)
    assert (first.cached, second.cached) == (False, True)
    assert second.path == tmp_path / "score" / RECIPE.key
    assert (second.path / "data.txt").read_text() == "result"
    assert store.has(RECIPE)


def test_manifest_says_what_it_is(tmp_path: Path) -> None:
    manifest = json.loads((Store(tmp_path, CPU).get(RECIPE, make_file).path / "manifest.json").read_text())
    assert manifest["stage"] == "score" and manifest["stage_version"] == 1 and manifest["key"] == RECIPE.key
    assert manifest["upstream"] == {"calibrate": "abc"} and manifest["config"] == {"ratio": 0.5}
    assert manifest["files"]["data.txt"]["size"] == 6 and len(manifest["files"]["data.txt"]["sha256"]) == 64
    assert {"torch", "transformers"} <= manifest["libraries"].keys()
    assert manifest["created"] and manifest["seconds"] >= 0 and manifest["peak_memory_bytes"] > 0 and "git_commit" in manifest


@pytest.mark.parametrize(
    "other",
    [
        Recipe("prune", 1, {"ratio": 0.5}, {"calibrate": "abc"}),
        Recipe("score", 2, {"ratio": 0.5}, {"calibrate": "abc"}),
        Recipe("score", 1, {"ratio": 0.4}, {"calibrate": "abc"}),
        Recipe("score", 1, {"ratio": 0.5}, {"calibrate": "abd"}),
    ],
)
def test_everything_that_matters_is_in_the_key(other: Recipe) -> None:
    assert other.key != RECIPE.key


def test_noise_in_floats_and_order_of_keys_do_not_matter() -> None:
    assert Recipe("score", 1, {"ratio": 0.6}, {}).key == Recipe("score", 1, {"ratio": 0.6000000000000001}, {}).key
    assert canonical_json({"b": 1, "a": [0.1 + 0.2]}) == '{"a":[0.3],"b":1}'


@pytest.mark.parametrize("damage", ["change", "truncate", "remove", "manifest"])
def test_damaged_artifacts_are_made_again(tmp_path: Path, damage: str) -> None:
    store = Store(tmp_path, CPU)
    path = store.get(RECIPE, make_file).path
    if damage == "change":
        (path / "data.txt").write_text("resulT")
    elif damage == "truncate":
        (path / "data.txt").write_text("res")
    elif damage == "remove":
        (path / "data.txt").unlink()
    else:
        (path / "manifest.json").write_text("{")
    again = store.get(RECIPE, make_file)
    assert not again.cached
    assert (again.path / "data.txt").read_text() == "result"


def test_a_failed_make_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        make_file(folder)
        raise RuntimeError("half-way")

    store = Store(tmp_path, CPU)
    with pytest.raises(RuntimeError, match="half-way"):
        store.get(RECIPE, fail)
    assert not store.has(RECIPE)
    assert [path.name for path in (tmp_path / "score").iterdir() if path.is_dir()] == []
    assert not store.get(RECIPE, make_file).cached


def test_parallel_processes_make_it_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    log = tmp_path / "log"
    processes = [context.Process(target=make_slowly, args=(str(tmp_path / "store"), str(log), 0.5)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=30)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(log.read_text().splitlines()) == 1
    assert Store(tmp_path / "store", CPU).has(RECIPE)


def test_kill_9_leaves_no_half_artifact_and_the_next_takes_over(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    root, log = tmp_path / "store", tmp_path / "log"
    process = context.Process(target=make_slowly, args=(str(root), str(log), 60.0))
    process.start()
    deadline = time.time() + 20
    while not log.exists() and time.time() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert list((root / "score").glob(".*.tmp-*"))  # what the killed process left
    assert not Store(root, CPU).has(RECIPE)
    assert not Store(root, CPU).get(RECIPE, make_file).cached
    assert not list((root / "score").glob(".*.tmp-*"))
