"""What is shown beside metrics: progress at most once a second, and layers by hand."""

from __future__ import annotations

import pytest

from heapr.tracking.values import CalibrationProgress, layer_table, results, run_id


class Lines(list):
    """A tracker that keeps what it is told."""

    def log(self, values: dict) -> None:
        self.append(values)

    def close(self, *, succeeded: bool) -> None:
        raise AssertionError


def test_progress_is_logged_at_most_once_a_second() -> None:
    times = iter([0.0, 0.4, 1.0, 1.9, 2.5])
    lines = Lines()
    progress = CalibrationProgress(lines, clock=lambda: next(times))
    for number in (1, 2, 3, 4):
        progress(100 * number, 5.0 - number)
    assert lines == [
        {"calibration/tokens": 200, "calibration/loss": 3.0, "calibration/tokens_per_second": 200.0},
        {"calibration/tokens": 400, "calibration/loss": 1.0, "calibration/tokens_per_second": 160.0},
    ]


def test_a_layer_is_a_row() -> None:
    layer = {
        "layer": 3, "layer_kept_ratio": 0.5, "widths_before": [4, 4, 4], "widths": [4, 2, 0], "kept_ratio": [1.0, 0.5, 0.0],
        "routing_frequency": [0.25, 1.0, 0.75],
    }  # fmt: skip
    table = layer_table([layer])
    assert dict(zip(table.columns, table.rows[0], strict=True)) == {
        "layer": 3, "kept_ratio": 0.5, "atomic_experts_before": 12, "atomic_experts": 6, "narrowest": 0, "widest": 4,
        "empty_experts": 1, "most_routed": 1.0,
    }  # fmt: skip


def test_a_change_is_a_share_of_the_dense_models_metric() -> None:
    """Neither of a standard error nor of zero, nor of what the dense model does not have."""
    dense = {
        "perplexity/a": 20.0,
        "accuracy/b": 0.5,
        "accuracy_stderr/b": 0.1,
        "parameters_zero": 0,
        "num_tokens/a": 8,
    }
    pruned = {
        "perplexity/a": 25.0,
        "accuracy/b": 0.4,
        "accuracy_stderr/b": 0.2,
        "parameters_zero": 3,
        "num_tokens/a": 8,
    }
    metrics = {"dense": dense, "pruned": pruned, "size": {"bytes": 7}, "comparison": {"kl_to_dense/a": 0.1}}
    found = results(metrics, 0.25)
    assert {name: value for name, value in found.items() if name.startswith("change/")} == {
        "change/perplexity/a": 0.25,
        "change/accuracy/b": pytest.approx(-0.2),
    }
    others = {"pruning.ratio": 0.25, "pruned/perplexity/a": 25.0, "bytes": 7, "kl_to_dense/a": 0.1}
    assert found.items() >= others.items()


def test_two_runs_have_two_ids_and_one_has_one() -> None:
    assert run_id("key", "/runs/1") == run_id("key", "/runs/1") != run_id("key", "/runs/2")
