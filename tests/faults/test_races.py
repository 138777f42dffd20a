"""Many processes on one store: each result is made once, nobody waits for ever, and the dead are replaced."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest

from heapr.store import Store
from tests.faults.disturbed import leftovers
from tests.store.mutations import CPU, STEPS, Made, data_of, make_all, tiny_steps

NUM_PROCESSES = 16
NUM_REPETITIONS = 20
SECONDS = 60.0  # in which all of them end

pytestmark = pytest.mark.faults


def make(root: Path, log: Path, steps: list[Made], dies_at: int | None) -> None:
    """Go through steps as a run does, and note in a file what is computed.

    Args:
        root: of the store.
        log: gets a line for every computation: stage, key, part and process.
        steps: in their order.
        dies_at: number of the computation in which the process kills itself while it holds the lock.
    """
    number = 0

    def compute(step: Made) -> None:
        nonlocal number
        number += 1
        with log.open("a") as file:
            file.write(f"{step.origin.stage} {step.origin.key} {step.part or '-'} {os.getpid()}\n")
        time.sleep(0.002)
        if number == dies_at:
            time.sleep(0.1)  # others wait at its lock meanwhile
            os.kill(os.getpid(), signal.SIGKILL)

    store = Store(root, CPU, wait_minutes=SECONDS / 60)
    for step in steps:
        store.get(step.origin, lambda step=step: compute(step), step.write, step.part)


def race(folder: Path, *, seed: int, num_dying: int) -> list[list[str]]:
    """Let all processes make the steps of one experiment, of another that has the same beginning, or of both.

    Returns:
        what was computed: stage, key, part and process, in order.
    """
    chance = random.Random(seed)
    first, second = tiny_steps(0), tiny_steps(1)
    wanted = [first, second, [*first, *second], [*second, *first]]
    root, log = folder / "store", folder / "log"
    log.touch()
    context = multiprocessing.get_context("fork")
    processes = []
    for number in range(NUM_PROCESSES):
        dies_at = chance.randint(1, 2) if number < num_dying else None
        steps = wanted[number % 2] if dies_at else chance.choice(wanted)
        process = context.Process(target=make, args=(root, log, steps, dies_at))
        processes.append(process)
        process.start()
        if dies_at:
            _wait_for(log, number + 1)
    for process in processes:
        process.join(SECONDS)
    # A process that hangs has no exit code.
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert set(codes) <= {0, -signal.SIGKILL}, codes
    assert codes.count(-signal.SIGKILL) == num_dying
    return [line.split() for line in log.read_text().splitlines()]


def _wait_for(log: Path, num_lines: int) -> None:
    """Wait until so many computations have begun."""
    end = time.monotonic() + SECONDS
    while len(log.read_text().splitlines()) < num_lines and time.monotonic() < end:
        time.sleep(0.005)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    root = tmp_path_factory.mktemp("expected")
    make_all(root)
    return data_of(root)


def check_store(root: Path, expected: dict[str, bytes]) -> None:
    make_all(root)  # if chance asked for one experiment alone
    assert data_of(root) == expected
    assert not leftovers(root)


@pytest.mark.parametrize("seed", range(NUM_REPETITIONS))
def test_each_result_is_made_once(tmp_path: Path, expected: dict[str, bytes], seed: int) -> None:
    computed = race(tmp_path, seed=seed, num_dying=0)
    made = [tuple(line[:3]) for line in computed]
    assert len(made) == len(set(made)) <= len(STEPS)
    check_store(tmp_path / "store", expected)


@pytest.mark.parametrize("seed", range(NUM_REPETITIONS))
def test_others_take_over_from_those_killed_while_they_hold_a_lock(
    tmp_path: Path, expected: dict[str, bytes], seed: int
) -> None:
    """A result is made again only if whoever made it was killed while doing so."""
    computed = race(tmp_path, seed=seed, num_dying=2)
    made = [tuple(line[:3]) for line in computed]
    assert len(made) - len(set(made)) == 2
    check_store(tmp_path / "store", expected)
