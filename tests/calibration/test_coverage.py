"""Coverage by hand; the line also comes when the calibration is in the store."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from heapr.calibration.coverage import Coverage, coverage_of, report_coverage
from tests.experiment import cached_stages, run_in, write_model, write_texts
from tests.tiny import layer_statistics, statistics_of


def test_least_median_and_not_reached(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    layers = {
        1: layer_statistics([100, 40, 0]),
        2: layer_statistics([9, 8, 6]),
        3: layer_statistics([7, 0, 0]),
    }
    coverage = coverage_of(statistics_of(layers, 90), {index: [1, 1, 1] for index in layers})
    assert coverage == Coverage(
        num_tokens=90, num_experts=9, least=0, median=7.0, is_low=True, not_reached={1: 1, 3: 2}
    )
    report_coverage(coverage)
    assert (
        "tokens per expert: least 0, median 7; 3 of 9 experts not reached (2 in layer 3, 1 in layer 1)"
        in caplog.text
    )
    warnings = [record for record in caplog.records if record.levelname == "WARNING"]
    assert (
        "at most 7 of the 90 calibration tokens" in warnings[0].message
        and "raise calibration.num_samples" in warnings[0].message
    )


@pytest.mark.parametrize(("counts", "is_few"), [([31, 31, 99], True), ([32, 32, 0], False)])
def test_few_are_below_32_at_the_median(
    counts: list[float], is_few: bool, caplog: pytest.LogCaptureFixture
) -> None:
    report_coverage(coverage_of(statistics_of({0: layer_statistics(counts)}, 90), {0: [1, 1, 1]}))
    assert bool(caplog.messages) == is_few


def test_many_layers_are_summed_up() -> None:
    missed = {index: 1 + index % 2 for index in range(8)}
    coverage = Coverage(num_tokens=90, num_experts=99, least=0, median=40.0, is_low=False, not_reached=missed)
    assert coverage.where_not_reached == (
        "2 in layer 1, 2 in layer 3, 2 in layer 5, 2 in layer 7, 4 in 4 other layers"
    )


def test_experts_without_atomic_experts_do_not_count(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    report_coverage(coverage_of(statistics_of({0: layer_statistics([0, 50, 60])}, 90), {0: [0, 4, 4]}))
    assert caplog.messages == ["calibrate tokens per expert: least 50, median 55; 0 of 2 experts not reached"]


def test_one_line_for_a_run_whether_made_or_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    settings = [
        "model=hf",
        f"model.path={write_model(tmp_path / 'model')}",
        "model.dtype=float32",
        "pruning.save_checkpoint=false",
    ]
    settings += [override for override in write_texts(tmp_path) if override.startswith("calibration")]
    few = [
        "evaluation=none",
        "calibration.num_samples=1",
        "calibration.sequence_length=16",
        "pruning.rounds=2",
        "pruning.ratio=0.5",
    ]
    for is_cached in (False, True):
        caplog.clear()
        summary = run_in(tmp_path, *settings, *few)
        assert cached_stages(summary)["calibrate"] is is_cached
        assert caplog.text.count("tokens per expert: least") == 1
        assert "half of the experts saw at most" in caplog.text
        assert summary.coverage["is_low"] and summary.coverage["num_tokens"] == 16
        logged = [json.loads(line) for line in (tmp_path / "run" / "tracking.jsonl").read_text().splitlines()]
        medians = [
            entry["calibration/tokens_per_expert_median"]
            for entry in logged
            if "calibration/tokens_per_expert_median" in entry
        ]
        assert medians[-1] == summary.coverage["median"]
