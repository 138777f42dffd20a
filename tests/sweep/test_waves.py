"""What several jobs need is made by one of them in a first wave."""

from __future__ import annotations

import pytest

from heapr.sweep.waves import waves


@pytest.mark.parametrize(
    ("to_make", "expected"),
    [
        ([["a"], ["a"], ["a"]], [[0], [1, 2]]),
        ([["a"], ["b"], ["a"], ["b"]], [[0, 1], [2, 3]]),
        ([["a", "d"], ["b", "d"], ["a", "d"], ["c"]], [[0], [1, 2, 3]]),  # b and c are nobody else's
        ([["a"], ["a", "b"], ["b"]], [[0, 1], [2]]),  # job 1 makes b while job 0 makes a
        ([["a"], ["b"]], [[0, 1]]),  # nothing is shared
        ([[], []], [[0, 1]]),  # all is there
        ([], []),
    ],
)
def test_waves_by_hand(to_make: list[list[str]], expected: list[list[int]]) -> None:
    assert waves(to_make) == expected
