"""A long sweep whose processes are killed at random ends, by starting it again and again, with the tables of an
undisturbed one, which leaks nothing.

With joblib if its launcher is installed, else one job after the other. HEAPR_SOAK_JOBS=40 makes it shorter.
"""

from __future__ import annotations

import csv
import importlib.util
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from statistics import median

import pytest

from tests.experiment import write_model, write_texts
from tests.faults.processes_of import Held, held_by, processes_of

ROOT = Path(__file__).parents[2]
NUM_JOBS = int(os.environ.get("HEAPR_SOAK_JOBS", "200"))  # a multiple of 20, at least 40
NUM_KILLS = 6
NOT_IN_A_SWEEP = ("throughput", "truth", "efficiency", "fidelity")
LIMIT = 1200.0  # seconds
EARLY, LATE = 20, int(0.85 * NUM_JOBS)  # finished jobs between which leaks are looked for
RUNS_JOBS = 200e6  # bytes: a process that has imported torch
GROWTH = 1.05
OTHERS = ("overrides", "time", "memory")  # in names of columns

pytestmark = pytest.mark.faults


Seen = dict[int, list[tuple[int, Held]]]


class Soak:
    """sweep.py and all that it starts.

    Args:
        folder: receives results.
        options: of sweep.py.
    """

    def __init__(self, folder: Path, options: list[str]) -> None:
        self.outputs = folder
        has_joblib = importlib.util.find_spec("hydra_plugins.hydra_joblib_launcher") is not None
        launcher = ["launcher=joblib", "hydra.launcher.n_jobs=2"] if has_joblib else []
        self._command = [sys.executable, "sweep.py", *options, *launcher, f"paths.outputs={folder}"]

    def run(self, watch: Callable[[int], None]) -> int:
        """Start it, and call `watch` with its id all the time; return the exit code."""
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        with (self.outputs.with_suffix(".txt")).open("w") as output:
            process = subprocess.Popen(self._command, cwd=ROOT, env=environment, stdout=output, stderr=output)
            end = time.monotonic() + LIMIT
            while process.poll() is None:
                assert time.monotonic() < end, self.output
                watch(process.pid)
                time.sleep(0.25)
        return process.returncode

    @property
    def output(self) -> str:
        return self.outputs.with_suffix(".txt").read_text()[-3000:]

    @property
    def newest(self) -> Path:
        """Folder of the newest sweep."""
        return sorted((self.outputs / "sweeps").iterdir())[-1]

    @property
    def num_finished(self) -> int:
        return len(list(self.outputs.glob("sweeps/*/[0-9]*/summary.json")))


def options_in(folder: Path) -> list[str]:
    """Criteria x ratios x seeds, of the smallest model there is."""
    num_seeds = NUM_JOBS // 20
    ratios = ",".join(f"0.{number:02d}" for number in range(5, 55, 5))
    seeds = ",".join(map(str, range(num_seeds)))
    texts = [text for text in write_texts(folder) if not any(name in text for name in NOT_IN_A_SWEEP)]
    options = ["experiment=ratio_curve", "model=tiny", f"model.path={write_model(folder / 'model')}", *texts]
    options += ["model.dtype=float32", "evaluation.efficiency=null", "evaluation.fidelity=null"]
    options += ["evaluation.routing=null", "pruning.save_checkpoint=false", "tracking=none"]
    return [*options, f"pruning.ratio={ratios}", "score=heapr,fisher", f"calibration.seed={seeds}"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Soak, Seen]:
    """A finished sweep, and by process what it held when so many jobs were finished."""
    folder = tmp_path_factory.mktemp("soak")
    soak = Soak(folder / "undisturbed", options_in(folder))
    seen: Seen = {}

    def watch(started: int) -> None:
        num_finished = soak.num_finished
        for pid in processes_of(started):
            held = held_by(pid)
            if held is not None:
                seen.setdefault(pid, []).append((num_finished, held))

    code = soak.run(watch)
    assert code == 0, soak.output
    assert soak.num_finished == NUM_JOBS
    return soak, seen


def test_nothing_leaks(undisturbed: tuple[Soak, Seen]) -> None:
    """In any process: sweep.py, the one that hands the jobs out, and those that run them."""
    _, seen = undisturbed
    num_running_jobs = 0
    for pid, samples in seen.items():
        before = _typical([held for number, held in samples if EARLY <= number < EARLY + NUM_JOBS // 8])
        after = _typical([held for number, held in samples if LATE <= number < NUM_JOBS])
        print(f"process {pid}: {before} early, {after} late")  # noqa: T201
        if not before.memory or not after.memory:
            continue
        num_running_jobs += before.memory > RUNS_JOBS
        assert after.memory <= GROWTH * before.memory, pid
        assert after.files <= before.files + 2, pid
        assert after.threads <= before.threads + 1, pid
    assert num_running_jobs > 1, "sweep.py has imported torch too, besides those that run jobs"


def _typical(held: list[Held]) -> Held:
    """The median of each number; zeros of nothing."""
    if not held:
        return Held(0, 0, 0)
    memory, files, threads = (int(median(column)) for column in zip(*held, strict=True))
    return Held(memory, files, threads)


def results_of(sweep: Path) -> list[dict[str, str]]:
    """The rows of a sweep's table, without its folder and what depends on the machine."""
    rows = csv.DictReader((sweep / "table.csv").read_text().splitlines())
    found = []
    for row in rows:
        kept = {name: value for name, value in row.items() if not any(word in name for word in OTHERS)}
        found.append(kept)
    return found


def test_random_kills_change_no_table(undisturbed: tuple[Soak, Seen], tmp_path: Path) -> None:
    """Any process of the sweep: sweep.py, what runs the jobs, or a worker."""
    expected, _ = undisturbed
    soak = Soak(tmp_path / "killed", options_in(expected.outputs.parent))
    chance = random.Random(20)
    num_kills = 0
    while num_kills < NUM_KILLS:
        wanted = soak.num_finished + chance.randint(1, max(2, NUM_JOBS // 10))
        is_killed = False

        def kill_one(started: int, wanted: int = wanted) -> None:
            nonlocal is_killed, num_kills
            if not is_killed and soak.num_finished >= wanted:
                is_killed = True
                num_kills += 1
                with suppress(ProcessLookupError):
                    os.kill(chance.choice(processes_of(started)), signal.SIGKILL)

        soak.run(kill_one)
    code = soak.run(lambda started: None)
    assert code == 0, soak.output
    assert results_of(soak.newest) == results_of(expected.newest)
    for name in ("table.md", "table.tex"):
        assert (soak.newest / name).read_text() == (expected.newest / name).read_text(), name
    print(f"{num_kills} kills of processes of a sweep of {NUM_JOBS} jobs survived")  # noqa: T201
