"""What is shown beside metrics: progress at most once a second, and layers by hand."""

from __future__ import annotations

from heapr.tracking.values import CalibrationProgress, layer_table


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
