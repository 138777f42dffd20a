"""run.py is killed, at random moments and at every named point of the store's protocol, and started again: it ends
with the same metrics, scores and checkpoint, and nothing half is ever visible."""

from __future__ import annotations

import random
import signal

import pytest

from tests.faults.disturbed import KILLED, Disturbed
from tests.faults.points import POINTS

NUM_KILLS = 60
SEED = 20

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module", params=["memory", "streamed"])
def disturbed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Disturbed:
    return Disturbed(tmp_path_factory.mktemp(request.param), is_streamed=request.param == "streamed")


def test_random_kills_change_nothing(disturbed: Disturbed) -> None:
    """Each attempt is killed at a moment of its own, until so many have been; those that ended before are compared."""
    chance = random.Random(SEED)
    num_kills = num_finished = 0
    seconds = disturbed.seconds
    disturbed.begin()
    while num_kills < NUM_KILLS // 2:
        ended = disturbed.start(after=chance.uniform(0, seconds))
        assert ended.code in {0, KILLED}, ended.output
        if ended.code == KILLED:
            num_kills += 1
            disturbed.check_visible()
            continue
        disturbed.check_end()
        num_finished += 1
        disturbed.begin()
    disturbed.finish()
    print(f"{num_kills} kills at random moments survived, {num_finished + 1} runs ended and compared")  # noqa: T201


def test_kills_at_every_point_change_nothing(disturbed: Disturbed) -> None:
    """The first time that a point is passed, the last, and one between."""
    chance = random.Random(SEED)
    num_kills = 0
    for point in POINTS:
        count = disturbed.counts[point]
        if not count and disturbed.is_streamed:
            continue  # calibration has other checkpoints then
        assert count, point
        for time in sorted({1, chance.randint(1, count), count}):
            disturbed.begin()
            ended = disturbed.start(point=point, time=time)
            assert ended.code == KILLED, (point, time, ended)
            disturbed.check_visible()
            disturbed.finish()
            num_kills += 1
    print(f"{num_kills} kills at {len(POINTS)} points survived")  # noqa: T201


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")]
)
def test_signals_end_in_one_line_and_change_nothing(
    disturbed: Disturbed, number: int, code: int, word: str
) -> None:
    chance = random.Random(int(number))
    num_signals = 0
    seconds = disturbed.seconds
    disturbed.begin()
    while num_signals < 12:
        ended = disturbed.start(number=number, after=chance.uniform(0.1, seconds))
        if ended.code == 0:
            disturbed.check_end()
            disturbed.begin()
            continue
        num_signals += 1
        assert ended.code == code, ended.output
        assert "Traceback" not in ended.output, ended.output
        assert ended.output.count(f"{word}: ") == 1, ended.output
        assert not list(disturbed.root.glob("*/.*.holder")), "locks are released"
        disturbed.check_visible()
    disturbed.finish()
