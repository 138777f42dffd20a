"""What the operating system refuses: full disks, missing permissions, read-only media. One line; nothing is lost."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from heapr.artifacts import ARTIFACTS
from heapr.errors import ConfigError
from heapr.log_file import LogFile
from heapr.one_line_errors import explained, marked_as_of_job
from heapr.os_errors import one_line_about
from heapr.store import Store
from tests.command import run_py_here
from tests.experiment import run_in, write_model, write_texts
from tests.store.mutations import CPU, STEPS, data_of, make_all, nothing
from tests.store.refusals import check_refusals

SCORE, PLAN, CHECKPOINT = STEPS[1], STEPS[2], STEPS[4]


def test_a_full_disk_at_many_moments_is_one_line_and_costs_nothing_that_was_finished(tmp_path: Path) -> None:
    """Every fourth moment; the others, and more codes and steps, in tests/faults."""
    check_refusals(tmp_path, errno.ENOSPC, CHECKPOINT, every=4)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a disk of a given size; skips where that is not allowed."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        if (
            shutil.which("mount") is None
            or subprocess.run(command, capture_output=True, check=False).returncode
        ):
            pytest.skip("a disk cannot be mounted here")
        return place

    yield mount
    subprocess.run(["umount", str(place)], capture_output=True, check=False)


@pytest.mark.parametrize("options", ["size=16k", "size=48k", "size=96k", "size=1m,nr_inodes=12"])
def test_a_full_disk_is_one_line_and_with_more_room_it_goes_on(
    small_disk: Callable[[str], Path], options: str
) -> None:
    root = small_disk(options) / "store"
    with pytest.raises(ConfigError, match="no space left in .*; what was finished is kept") as refused:
        make_all(root)
    assert "\n" not in str(refused.value)
    assert not list(root.glob("*/.*tmp-*"))
    store = Store(root, CPU)
    finished = [step for step in STEPS if store.has(step.origin, step.part)]
    assert len(finished) < len(STEPS)
    size = "size=9m,nr_inodes=0"
    subprocess.run(["mount", "-o", f"remount,{size}", str(root.parent)], check=True)
    made = make_all(root)
    assert [artifact.cached for artifact in made].count(True) == len(finished)


def test_a_limit_on_the_size_of_files_is_one_line(tmp_path: Path) -> None:
    def limited(queue: multiprocessing.Queue) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            make_all(tmp_path)
        except ConfigError as error:
            queue.put(str(error))

    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=limited, args=(queue,))
    process.start()
    assert "raise the limit (ulimit -f)" in queue.get(timeout=30)
    process.join(timeout=30)


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A complete store on read-only media."""
    root = tmp_path / "store"
    make_all(root)
    (root / ".runs").mkdir(exist_ok=True)
    bind = subprocess.run(["mount", "--bind", str(root), str(root)], capture_output=True, check=False)
    if bind.returncode:
        pytest.skip("nothing can be mounted here")
    subprocess.run(["mount", "-o", "remount,ro,bind", str(root)], check=True)
    yield root
    subprocess.run(["umount", str(root)], check=True)


def test_a_complete_store_is_read_without_writing(read_only: Path, tmp_path: Path) -> None:
    assert all(artifact.cached for artifact in make_all(read_only))
    store = Store(read_only, CPU)
    store.refer(tmp_path, [PLAN.origin])
    store.rewrite(CHECKPOINT.origin, CHECKPOINT.part, "checkpoint/README.md", lambda text: text)
    assert store.read(PLAN.origin, lambda folder: (folder / "allocation.json").read_text())
    with pytest.raises(ConfigError, match="Read-only file system; choose another folder"):
        store.check_writable()
    with pytest.raises(ConfigError, match="read-only"):
        store.rewrite(CHECKPOINT.origin, CHECKPOINT.part, "checkpoint/README.md", lambda text: text + "x")
    other = STEPS[0].origin.__class__("calibrate", 1, {"seed": 7}, {})
    with pytest.raises(ConfigError, match="its file system is read-only; choose another folder"):
        store.get(other, nothing, STEPS[0].write)


def test_a_folder_of_results_that_is_removed_meanwhile_is_one_line(tmp_path: Path) -> None:
    store = Store(tmp_path / "store", CPU)
    with pytest.raises(ConfigError, match="it was removed during the run; start again"):
        store.get(SCORE.origin, lambda: shutil.rmtree(tmp_path / "store"), SCORE.write)


def test_a_clock_that_jumps_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By decades, forward and back, at every look at it."""
    overrides = ["model=hf", f"model.path={write_model(tmp_path / 'model')}", *write_texts(tmp_path)]
    overrides += ["pruning/repair=stream", "evaluation.throughput=null", "evaluation.truth=null"]
    steady = run_in(tmp_path / "steady", *overrides)
    real, chance = time.time, random.Random(0)
    looks = 0

    def jumping() -> float:
        nonlocal looks
        looks += 1
        return real() + chance.choice([-20, 0, 20]) * 365 * 24 * 3600

    monkeypatch.setattr(time, "time", jumping)
    jumped, again = (run_in(tmp_path / "jumping", *overrides) for _ in range(2))
    assert looks > 0
    assert jumped.metrics == again.metrics == steady.metrics
    assert data_of(tmp_path / "jumping" / "outputs" / ARTIFACTS) == data_of(
        tmp_path / "steady" / "outputs" / ARTIFACTS
    )
    assert all(stage["cached"] for stage in again.stages)


def test_a_card_that_cannot_be_written_does_not_fail_a_finished_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    texts = [text for text in write_texts(tmp_path) if not text.startswith("evaluation")]
    overrides = ["model=hf", f"model.path={write_model(tmp_path / 'model')}", *texts, "evaluation=none"]
    run_in(tmp_path, *overrides)
    rewrites: list[str] = []

    def refuse_rewrite(*args: object, **kwargs: object) -> None:
        rewrites.append("refused")
        raise PermissionError(errno.EACCES, "", str(tmp_path / "outputs" / "artifacts" / "README.md"))

    monkeypatch.setattr("heapr.store.store.rewrite_text", refuse_rewrite)
    card = next((tmp_path / "outputs" / "artifacts" / "prune").glob("*/checkpoint/README.md"))
    monkeypatch.setattr("heapr.pipeline.model_card", lambda about, metrics, before="": before + "more\n")
    summary = run_in(tmp_path, *overrides)
    assert rewrites and summary.stages and (tmp_path / "run" / "summary.json").is_file()
    assert "the model card of the checkpoint lacks the metrics: no permission for" in caplog.text
    assert "more" not in card.read_text()


@pytest.mark.parametrize(
    ("code", "why"),
    [(errno.ENAMETOOLONG, "a path cannot be as long"), (errno.ELOOP, "lead back to themselves")],
)
def test_a_path_that_the_system_does_not_take_is_one_line(tmp_path: Path, code: int, why: str) -> None:
    with pytest.raises(ConfigError, match=why), one_line_about(tmp_path):
        raise OSError(code, os.strerror(code), str(tmp_path / "artifacts" / "score"))


def test_a_log_without_room_ends_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    logger = logging.Logger("full")
    handler = LogFile("/dev/full")
    logger.addHandler(handler)
    for number in range(3):
        logger.warning("line %d", number)
    handler.close()
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["cannot write '/dev/full': No space left on device; the log goes on here alone"]


def test_a_disk_that_is_full_before_the_job_starts_is_one_line() -> None:
    with (
        pytest.raises(ConfigError, match="cannot write the run's folder: No space left on device"),
        explained(),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_only_what_is_raised_outside_the_job_is_about_the_folder_of_the_run() -> None:
    """Also after a launcher sent it from another process, which has no stack of ours."""

    def raise_error() -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/root/there")

    with pytest.raises(ConfigError, match="cannot write '/root/there': Permission denied"), explained():
        raise_error()
    with pytest.raises(PermissionError) as inside, explained(), marked_as_of_job():
        raise_error()
    sent = pickle.loads(pickle.dumps(inside.value))
    with pytest.raises(PermissionError, match="/root/there"), explained():
        raise sent


@pytest.mark.parametrize("options", [[], ["-m"]], ids=["run", "sweep"])
def test_a_file_that_a_job_misses_is_not_taken_for_the_folder_of_the_run(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def miss_a_file(*_: object, **__: object) -> None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "/gone")

    monkeypatch.setattr("heapr.run_experiment.run", miss_a_file)
    with pytest.raises(FileNotFoundError, match="/gone"):
        run_py_here(*options, "tracking=none", folder=tmp_path)
