"""The fast part of make faults: a killed run goes on from its last checkpoint, with the same results."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.disturbed import KILLED, Disturbed, read_counts


@pytest.mark.slow
def test_calibration_and_repair_in_memory_go_on_where_they_were_killed(tmp_path: Path) -> None:
    disturbed = Disturbed(tmp_path, is_streamed=False)
    assert disturbed.counts["behind a checkpoint of calibration"] == 6  # batches
    assert disturbed.start(point="behind a checkpoint of calibration", time=2).code == KILLED
    ended = disturbed.start(
        point="inside a checkpoint of calibration", time=5
    )  # of two layers, the third batch's
    assert ended.code == KILLED and "goes on behind batch 2, from a checkpoint" in ended.output
    assert disturbed.start(point="behind a repaired layer", time=2).code == KILLED
    disturbed.check_visible()
    counts = tmp_path / "counts.txt"
    ended = disturbed.start(counts=str(counts))
    assert ended.code == 0, ended.output
    assert read_counts(counts)["behind a repaired layer"] == 1  # the third
    disturbed.check_end()
