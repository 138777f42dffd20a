"""Results measured in different ways are told apart."""

from __future__ import annotations

from heapr.report.run.protocol import compare_summaries, protocol_differences

RECORD = {"corpus": {"corpus": "wikitext2", "commit": "abc"}, "window": 2048, "joiner": "\n\n"}


def test_equal_protocols_do_not_differ_and_what_one_alone_measured_is_no_difference() -> None:
    assert protocol_differences({"a": {"x": RECORD}, "b": {"x": dict(RECORD), "y": {"window": 1}}}) == []


def test_a_difference_is_named_with_its_field_values_and_results() -> None:
    other = {**RECORD, "window": 512, "corpus": {"corpus": "wikitext2", "commit": "def"}}
    summaries = {
        "first": {"protocols": {"dense": {"x": RECORD}, "pruned": {"x": RECORD}}},
        "second": {"protocols": {"dense": {"x": other}}},
    }
    assert compare_summaries(summaries) == [
        'x was measured with different corpus.commit: "abc" (first dense and 1 more), "def" (second dense)',
        "x was measured with different window: 2048 (first dense and 1 more), 512 (second dense)",
    ]


def test_a_field_that_one_record_lacks_is_a_difference() -> None:
    lines = protocol_differences({"a": {"x": RECORD}, "b": {"x": {**RECORD, "stride": 64}}})
    assert lines == ["x was measured with different stride: null (a), 64 (b)"]
