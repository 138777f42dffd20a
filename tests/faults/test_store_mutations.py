"""300 random mutations of a store: each is noticed; what was damaged is moved aside and made again."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.store.mutations import KINDS, check_damage, make_all

NUM_MUTATIONS = 300

pytestmark = pytest.mark.faults


def test_every_mutation_is_noticed_kept_and_made_good(tmp_path: Path) -> None:
    make_all(tmp_path / "pristine")
    for number in range(NUM_MUTATIONS):
        kind = KINDS[number % len(KINDS)]
        check_damage(tmp_path / "pristine", tmp_path / "store", kind, seed=1000 + number)
