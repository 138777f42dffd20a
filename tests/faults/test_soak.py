"""A long sweep whose processes are killed at random ends, by starting it again and again, with the tables of an
undisturbed one, which leaks nothing.

With joblib if its launcher is installed, else one job after the other. HEAPR_SOAK_JOBS=40 makes it shorter.
"""

from __future__ import annotations

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
EARLY, LATE = (0.1, 0.25), (0.85, 1.0)  # shares of the sweep between which leaks are looked for
GROWTH = 1.05

pytestmark = [pytest.mark.faults, pytest.mark.xdist_group("soak")]


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
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Soak, dict[int, list[tuple[float, Held]]]]:
    """A finished sweep, and by process what it held at which share of the sweep."""
    folder = tmp_path_factory.mktemp("soak")
    soak = Soak(folder / "undisturbed", options_in(folder))
    seen: dict[int, list[tuple[float, Held]]] = {}

    def watch(started: int) -> None:
        share = soak.num_finished / NUM_JOBS
        for pid in processes_of(started):
            held = held_by(pid)
            if held is not None:
                seen.setdefault(pid, []).append((share, held))

    code = soak.run(watch)
    assert code == 0, soak.output
    assert soak.num_finished == NUM_JOBS
    return soak, seen


def test_nothing_leaks(undisturbed: tuple[Soak, dict[int, list[tuple[float, Held]]]]) -> None:
    _, seen = undisturbed
    num_compared = 0
    for pid, held in seen.items():
        early = [each for share, each in held if EARLY[0] <= share <= EARLY[1]]
        late = [each for share, each in held if LATE[0] <= share < LATE[1]]
        if not early or not late:
            continue
        num_compared += 1
        before, after = (
            Held(*(int(median(column)) for column in zip(*some, strict=True))) for some in (early, late)
        )
        print(f"process {pid}: {before} early, {after} late in the sweep")  # noqa: T201
        assert after.memory <= GROWTH * before.memory, pid
        assert after.files <= before.files + 2, pid
        assert after.threads <= before.threads + 1, pid
    assert num_compared > 0


def test_random_kills_change_no_table(
    undisturbed: tuple[Soak, dict[int, list[tuple[float, Held]]]], tmp_path: Path
) -> None:
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
    for name in ("table.csv", "table.md", "table.tex"):
        assert (soak.newest / name).read_text() == (expected.newest / name).read_text(), name
    print(f"{num_kills} kills of processes of a sweep of {NUM_JOBS} jobs survived")  # noqa: T201
