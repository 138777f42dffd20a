"""Numbers for a terminal."""

from __future__ import annotations

from heapr.report.terminal import operations


def test_operations_are_never_a_power_of_ten() -> None:
    assert [operations(n) for n in (15_016 * 10**12, 24_340_000_000_000, 7_876_000_000, 7_876_000)] == [
        "15,016 TFLOPs",
        "24.34 TFLOPs",
        "7.876 GFLOPs",
        "7.876 MFLOPs",
    ]
