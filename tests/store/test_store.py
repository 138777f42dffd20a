"""The artifact store: made once, verified, safe under parallel jobs and kill -9."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from heapr.errors import ConfigError
from heapr.files import make_folder, write_text
from heapr.origin import Origin, canonical_json
from heapr.store import Store
from heapr.store.leftovers import SCRATCH_DAYS

CPU = torch.device("cpu")
ORIGIN = Origin(stage="made", version=1, config={"ratio": 0.5}, upstream={"calibrate": "abc"})


def nothing() -> None:
    """The value of an artifact whose files hold nothing of it."""


def make_file(folder: Path, _: None = None) -> None:
    (folder / "data.txt").write_text("result")


def make_slowly(root: str, log: str, seconds: float) -> None:
    def make(folder: Path, _: None = None) -> None:
        with Path(log).open("a") as file:
            file.write(f"made by {os.getpid()}\n")
        time.sleep(seconds)
        make_file(folder)

    Store(Path(root), CPU).get(ORIGIN, nothing, make)


def forbidden(folder: Path, _: None = None) -> None:
    raise AssertionError("made again")


def test_made_once_then_cached(tmp_path: Path) -> None:
    store = Store(tmp_path, CPU)
    assert not store.has(ORIGIN)
    first, second = store.get(ORIGIN, nothing, make_file), store.get(ORIGIN, nothing, forbidden)
    assert (first.cached, second.cached) == (False, True)
    assert second.path == tmp_path / "made" / ORIGIN.key
    assert (second.path / "data.txt").read_text() == "result"
    assert store.has(ORIGIN)


def test_the_value_is_computed_apart_from_writing_its_files(tmp_path: Path) -> None:
    store = Store(tmp_path, CPU)
    seen: list[str] = []

    def compute() -> str:
        seen.append("computed")
        return "value"

    def write(folder: Path, value: str) -> None:
        seen.append(f"wrote {value}")
        (folder / "data.txt").write_text(value)

    path = store.get(ORIGIN, compute, write).path
    assert (path / "data.txt").read_text() == "value" and seen == ["computed", "wrote value"]
    assert store.get(ORIGIN, compute, write).cached and len(seen) == 2


def test_manifest_says_what_it_is(tmp_path: Path) -> None:
    manifest = json.loads(
        (Store(tmp_path, CPU).get(ORIGIN, nothing, make_file).path / "manifest.json").read_text()
    )
    assert manifest["stage"] == "made" and manifest["stage_version"] == 1 and manifest["key"] == ORIGIN.key
    assert manifest["upstream"] == {"calibrate": "abc"} and manifest["config"] == {"ratio": 0.5}
    assert manifest["files"]["data.txt"]["size"] == 6 and len(manifest["files"]["data.txt"]["sha256"]) == 64
    assert {"torch", "transformers"} <= manifest["libraries"].keys()
    assert (
        manifest["created"]
        and manifest["seconds"] >= 0
        and manifest["peak_memory_bytes"] > 0
        and "git_commit" in manifest
    )


@pytest.mark.parametrize(
    "other",
    [
        Origin("other", 1, {"ratio": 0.5}, {"calibrate": "abc"}),
        Origin("made", 2, {"ratio": 0.5}, {"calibrate": "abc"}),
        Origin("made", 1, {"ratio": 0.4}, {"calibrate": "abc"}),
        Origin("made", 1, {"ratio": 0.5}, {"calibrate": "abd"}),
    ],
)
def test_everything_that_matters_is_in_the_key(other: Origin) -> None:
    assert other.key != ORIGIN.key


def test_noise_in_floats_and_order_of_keys_do_not_matter() -> None:
    assert (
        Origin("made", 1, {"ratio": 0.6}, {}).key == Origin("made", 1, {"ratio": 0.6000000000000001}, {}).key
    )
    assert canonical_json({"b": 1, "a": [0.1 + 0.2]}) == '{"a":[0.3],"b":1}'


@pytest.mark.parametrize("damage", ["change", "truncate", "remove", "manifest"])
def test_damaged_artifacts_are_made_again(tmp_path: Path, damage: str) -> None:
    store = Store(tmp_path, CPU)
    path = store.get(ORIGIN, nothing, make_file).path
    if damage == "change":
        (path / "data.txt").write_text("resulT")
    elif damage == "truncate":
        (path / "data.txt").write_text("res")
    elif damage == "remove":
        (path / "data.txt").unlink()
    else:
        (path / "manifest.json").write_text("{")
    again = store.get(ORIGIN, nothing, make_file)
    assert not again.cached
    assert (again.path / "data.txt").read_text() == "result"


def test_a_failed_make_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path, _: None = None) -> None:
        make_file(folder)
        raise RuntimeError("half-way")

    store = Store(tmp_path, CPU)
    with pytest.raises(RuntimeError, match="half-way"):
        store.get(ORIGIN, nothing, fail)
    assert not store.has(ORIGIN)
    assert [path.name for path in (tmp_path / "made").iterdir() if path.is_dir()] == []
    assert not store.get(ORIGIN, nothing, make_file).cached


def test_parallel_processes_make_it_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    log = tmp_path / "log"
    processes = [
        context.Process(target=make_slowly, args=(str(tmp_path / "store"), str(log), 0.5)) for _ in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=30)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(log.read_text().splitlines()) == 1
    assert Store(tmp_path / "store", CPU).has(ORIGIN)


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
    assert list((root / "made").glob(".*.tmp-*"))  # what the killed process left
    assert not Store(root, CPU).has(ORIGIN)
    assert not Store(root, CPU).get(ORIGIN, nothing, make_file).cached
    assert not list((root / "made").glob(".*.tmp-*"))


def count_up(root: str, steps: int, pause_at: int) -> None:
    """Compute in steps, each kept in scratch once it is done; pause before one of them, as if it took
    long."""
    store = Store(Path(root), CPU)

    def compute() -> str:
        scratch = store.scratch(ORIGIN)
        with (Path(root) / "log").open("a") as log:
            log.write(f"begins with {sorted(path.name for path in scratch.iterdir())}\n")
        for number in range(steps):
            if number == pause_at:
                time.sleep(60)
            write_text(scratch / str(number), "done")
        return " ".join(sorted(path.name for path in scratch.iterdir()))

    store.get(ORIGIN, compute, lambda folder, value: write_text(folder / "data.txt", value))


def scratch_folders(root: Path) -> list[str]:
    return [path.name for path in root.glob("*/.*.scratch-*")]


def test_scratch_outlives_kill_9_and_is_swept_with_the_artifact_published(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=count_up, args=(str(tmp_path), 4, 2))
    process.start()
    deadline = time.time() + 20
    while not list(tmp_path.glob("made/.*.scratch-whole/1")) and time.time() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    count_up(str(tmp_path), 4, pause_at=-1)
    assert (tmp_path / "log").read_text() == "begins with []\nbegins with ['0', '1']\n"
    assert (Store(tmp_path, CPU).path(ORIGIN) / "data.txt").read_text() == "0 1 2 3"
    assert scratch_folders(tmp_path) == []


def test_two_processes_never_share_a_scratch_folder(tmp_path: Path) -> None:
    """The second waits at the lock and finds the artifact made."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=count_up, args=(str(tmp_path), 200, -1)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=30)
    assert [process.exitcode for process in processes] == [0, 0]
    assert (tmp_path / "log").read_text() == "begins with []\n" and scratch_folders(tmp_path) == []


def test_scratch_of_a_failed_computation_stays_and_parts_have_their_own(tmp_path: Path) -> None:
    store = Store(tmp_path, CPU)
    store.get(ORIGIN, nothing, make_file)

    def fail() -> None:
        (store.scratch(ORIGIN, "extra") / "half").touch()
        raise RuntimeError("half-way")

    with pytest.raises(RuntimeError, match="half-way"):
        store.get(ORIGIN, fail, make_part, "extra")
    assert scratch_folders(tmp_path) == [f".{ORIGIN.key}.scratch-extra"]
    store.get(ORIGIN, nothing, make_part, "extra")
    assert scratch_folders(tmp_path) == []


def test_old_scratch_is_swept_unless_it_is_in_use_or_was_changed(tmp_path: Path) -> None:
    store = Store(tmp_path, CPU)
    old, changed, in_use = (Origin("made", 1, {"ratio": ratio}, {}) for ratio in (0.1, 0.2, 0.3))
    long_ago = time.time() - (SCRATCH_DAYS + 1) * 24 * 3600
    for origin in (old, changed, in_use):
        (store.scratch(origin) / "piece").touch()
        for path in (store.scratch(origin) / "piece", store.scratch(origin)):
            os.utime(path, (long_ago, long_ago))
    (store.scratch(changed) / "new piece").touch()

    def compute() -> list[str]:
        store.get(ORIGIN, nothing, make_file)
        return scratch_folders(tmp_path)

    def write(folder: Path, left: list[str]) -> None:
        assert set(left) == {f".{origin.key}.scratch-whole" for origin in (changed, in_use)}

    store.get(in_use, compute, write)
    assert scratch_folders(tmp_path) == [f".{changed.key}.scratch-whole"]


def make_part(folder: Path, _: None = None) -> None:
    (folder / "inside").mkdir()
    (folder / "inside" / "more.txt").write_text("more")


def test_a_part_is_made_and_described_by_itself(tmp_path: Path) -> None:
    store = Store(tmp_path, CPU)
    whole = store.get(ORIGIN, nothing, make_file)
    assert not store.has(ORIGIN, "extra")
    part = store.get(ORIGIN, nothing, make_part, "extra")
    assert (part.path, part.part, part.cached) == (whole.path, "extra", False)
    assert (
        store.get(ORIGIN, nothing, forbidden).cached and store.get(ORIGIN, nothing, forbidden, "extra").cached
    )
    manifest = json.loads((whole.path / "manifest.json").read_text())
    assert manifest["files"].keys() == {"data.txt"} and manifest["parts"]["extra"]["files"].keys() == {
        "inside/more.txt"
    }
    assert manifest["parts"]["extra"]["seconds"] >= 0 and manifest["parts"]["extra"]["created"]


def test_a_part_that_fails_or_is_damaged_costs_nothing_else(tmp_path: Path) -> None:
    store = Store(tmp_path, CPU)
    path = store.get(ORIGIN, nothing, make_file).path

    def fail(folder: Path, _: None = None) -> None:
        make_part(folder)
        raise RuntimeError("half-way")

    with pytest.raises(RuntimeError, match="half-way"):
        store.get(ORIGIN, nothing, fail, "extra")
    assert store.has(ORIGIN) and not store.has(ORIGIN, "extra") and not (path / "inside").exists()
    store.get(ORIGIN, nothing, make_part, "extra")
    (path / "inside" / "more.txt").write_text("mora")
    assert store.has(ORIGIN) and not store.has(ORIGIN, "extra")
    assert not store.get(ORIGIN, nothing, make_part, "extra").cached
    assert (path / "inside" / "more.txt").read_text() == "more" and store.get(
        ORIGIN, nothing, forbidden
    ).cached


def test_files_of_a_part_that_the_manifest_does_not_know_yet_are_made_again(tmp_path: Path) -> None:
    """Killed between moving files and writing the manifest."""
    store = Store(tmp_path, CPU)
    path = store.get(ORIGIN, nothing, make_file).path
    (path / "inside").mkdir()
    (path / "inside" / "half.txt").write_text("ha")
    assert not store.has(ORIGIN, "extra")
    store.get(ORIGIN, nothing, make_part, "extra")
    assert [file.name for file in (path / "inside").iterdir()] == ["more.txt"] and store.has(ORIGIN, "extra")


@pytest.mark.parametrize("kind", ["file", "link to a folder", "link to nothing"])
def test_what_is_in_the_place_of_a_part_does_not_stop_it(tmp_path: Path, kind: str) -> None:
    store = Store(tmp_path / "store", CPU)
    place = store.get(ORIGIN, nothing, make_file).path / "inside"
    elsewhere = tmp_path / "elsewhere"
    if kind == "file":
        place.write_text("mine")
    else:
        place.symlink_to(elsewhere)
    if kind == "link to a folder":
        elsewhere.mkdir()
        (elsewhere / "mine.txt").write_text("mine")
    store.get(ORIGIN, nothing, make_part, "extra")
    assert store.has(ORIGIN, "extra") and not place.is_symlink()
    assert kind != "link to a folder" or (elsewhere / "mine.txt").is_file()


def test_what_changes_between_a_check_and_its_reading_is_not_used(tmp_path: Path) -> None:
    """And a file that is damaged while it is read."""
    store = Store(tmp_path, CPU)
    file = store.get(ORIGIN, nothing, make_file).path / "data.txt"
    store.get(ORIGIN, nothing, make_part, "extra")
    assert store.has(ORIGIN)
    file.write_text("RESULT")
    with pytest.raises(
        ConfigError, match="was removed or damaged while the run needed it .data.txt has changed"
    ):
        store.read(ORIGIN, lambda folder: (folder / "data.txt").read_text())
    file.write_text("result")

    def read(folder: Path) -> str:
        (folder / "inside" / "more.txt").write_text("mora")
        return (folder / "inside" / "more.txt").read_text()

    assert store.read(ORIGIN, lambda folder: (folder / "data.txt").read_text()) == "result"
    with pytest.raises(ConfigError, match="more.txt has changed"):
        store.read(ORIGIN, read, "extra")


def test_parallel_processes_make_a_part_once(tmp_path: Path) -> None:
    Store(tmp_path, CPU).get(ORIGIN, nothing, make_file)
    log = tmp_path / "log"

    def make_both() -> None:
        def make(folder: Path, _: None = None) -> None:
            with log.open("a") as file:
                file.write("made\n")
            time.sleep(0.3)
            make_part(folder)

        Store(tmp_path, CPU).get(ORIGIN, nothing, make, "extra")

    processes = [multiprocessing.get_context("fork").Process(target=make_both) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=30)
    assert [process.exitcode for process in processes] == [0, 0, 0] and log.read_text() == "made\n"


@pytest.mark.parametrize(
    ("umask", "file_mode", "folder_mode"),
    [(0o002, 0o664, 0o775), (0o022, 0o644, 0o755), (0o077, 0o600, 0o700)],
)
def test_modes_follow_the_umask_and_locks_are_the_groups(
    tmp_path: Path, umask: int, file_mode: int, folder_mode: int
) -> None:
    def make(folder: Path, _: None = None) -> None:
        make_part(folder)
        save_file({"a": torch.zeros(1)}, folder / "a.safetensors")  # written with 0600, whatever the umask

    before = os.umask(umask)
    try:
        path = Store(tmp_path / "store", CPU).get(ORIGIN, nothing, make).path
    finally:
        os.umask(before)
    modes = {entry.name: entry.stat().st_mode & 0o777 for entry in [path, *path.rglob("*")]}
    files = {"more.txt", "a.safetensors", "manifest.json"}
    assert (
        modes == {name: file_mode if name in files else folder_mode for name in modes}
        and files < modes.keys()
    )
    (lock,) = path.parent.glob(".*.lock")
    assert lock.stat().st_mode & 0o660 == 0o660


def as_user(user: int, group: int, action: Callable[[], None]) -> str:
    """What an action of another user ends with: "done", or the error's one line."""
    context = multiprocessing.get_context("fork")
    queue = context.Queue()

    def act() -> None:
        os.setgroups([])
        os.setgid(group)
        os.setuid(user)
        os.umask(0o002)
        try:
            action()
            queue.put("done")
        except ConfigError as error:
            queue.put(str(error))

    process = context.Process(target=act)
    process.start()
    answer: str = queue.get(timeout=30)
    process.join(timeout=30)
    return answer


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become two users")
def test_two_users_share_a_store_or_are_told_in_one_line() -> None:
    group, other = ORIGIN, Origin("made", 1, {"ratio": 0.4}, {})
    with tempfile.TemporaryDirectory(dir="/tmp") as name:  # below a folder that others may enter
        root = Path(name) / "store"
        os.chmod(name, 0o777)
        assert as_user(12001, 12000, lambda: Store(root, CPU).get(group, nothing, make_file)) == "done"
        assert as_user(12002, 12000, lambda: Store(root, CPU).get(group, nothing, forbidden)) == "done"
        assert as_user(12002, 12000, lambda: Store(root, CPU).get(other, nothing, make_file)) == "done"
        assert (
            as_user(12001, 12000, lambda: Store(root, CPU).get(group, nothing, make_part, "extra")) == "done"
        )
        (root / "made" / ORIGIN.key / "data.txt").chmod(0o600)
        refused = as_user(12002, 12000, lambda: Store(root, CPU).get(group, nothing, forbidden))
        assert (
            "no permission for" in refused
            and "data.txt" in refused
            and "umask 002" in refused
            and "\n" not in refused
        )


def test_what_will_not_fit_is_refused_with_both_numbers(tmp_path: Path) -> None:
    store = Store(tmp_path, CPU)
    store.check_space(0, "nothing", "go on")
    with pytest.raises(
        ConfigError, match=r"the weights need 1e\+09 GB, and .* has .* GB free; .*or leave them out"
    ):
        store.check_space(10**18, "the weights", "leave them out")


@pytest.mark.parametrize("before", ["nothing", "a file", "a link"])
def test_several_processes_make_one_folder(tmp_path: Path, before: str) -> None:
    """As ranks do with their scratch: nobody removes what another one has made."""
    for number in range(30):
        folder = tmp_path / f"scratch-{number}"
        if before == "a file":
            folder.write_text("x")
        if before == "a link":
            folder.symlink_to(tmp_path)
        barrier = threading.Barrier(4)

        def make_and_use(rank: int, folder: Path = folder, barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            make_folder(folder)
            (folder / str(rank)).write_text("kept")

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(make_and_use, range(4)))
        assert len(list(folder.iterdir())) == 4 and not folder.is_symlink()
