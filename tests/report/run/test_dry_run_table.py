"""The dry run's tables are whole on a narrow terminal."""

from __future__ import annotations

import io

from rich.console import Console

from heapr.report.run.dry_run_table import print_dry_run

PLAN = {
    "name": "qwen3_30b_a3b heapr global 25%", "path": "a/folder/with/a/long/name/and/no/blanks", "architecture": "Qwen3MoeForCausalLM",
    "dtype": "bfloat16", "ratio": 0.25, "budget": "atomic_experts", "form": "ragged",
    "num_layers": 48, "num_moe_layers": 47, "num_experts": (128, 128), "width": (8, 768),
    "experts_per_token": 8, "atomic_experts": 4_000, "atomic_experts_removed": 1_000, "parameters": 40_000, "expert_parameters": 20_000,
    "parameters_removed": 5_000, "weight_bytes": 3 * 2**30, "statistics_bytes": 2**29, "matrix_bytes": 7 * 2**30, "num_samples": 128,
    "batch_size": 8, "sequence_length": 2048, "activation_bytes": 2**30,
    "peak_memory": {"calibrate": {"weights": 2**31, "interpreter": 2**29}, "repair": {"weights": 3 * 2**29}}, "bytes_read": 2**32, "tape_bytes": 2**33, "calibration_flops": 4_456 * 10**12,
    "expected_seconds": 150.0, "estimated_seconds": None, "num_expected": 2, "num_missing": 3,
    "stages": [
        {"stage": "calibrate", "what": "", "key": "0123456789abcdef", "cached": True},
        {"stage": "evaluate", "what": "perplexity/numpydocs pruned", "key": "fedcba9876543210", "cached": False},
    ],
    "notes": ["text file 'x' does not exist"],
}  # fmt: skip


def printed(**changes: object) -> list[str]:
    console = Console(width=80, record=True, file=io.StringIO())
    print_dry_run({**PLAN, **changes}, console)
    return console.export_text().splitlines()


def line_with(text: str, lines: list[str]) -> str:
    return next(line for line in lines if text in line)


def test_every_number_is_there_and_nothing_is_cut() -> None:
    lines = printed()
    assert not any("…" in line or len(line) > 80 for line in lines)
    for name, expected in {
        "MoE layers": "47  of 48 layers", "experts  ": "128  of a layer, 8 per token", "width  ": "8 to 768", "atomic experts  ": "4,000",
        "parameters  ": "50.0% in routed experts", "removed": "1,000  atomic experts, 25.0%", "5,000": "12.5% (25.0% of experts')",
        "left": "35,000", "weights": "3.00 GiB  bfloat16", "statistics": "512.00 MiB  in place of 7.00 GiB", "activations": "1.00 GiB",
        "together": "4.50 GiB", "peak memory": "2.50 GiB  calibrate: weights 2.00 GiB", "repair": "1.50 GiB", "read  ": "4.00 GiB", "on disk": "8.00 GiB",
        "calibration  ": "4,456 TFLOPs", "time": "2.5 min  for 2 of 3 to be made", "calibrate ": "cached", "numpydocs pruned": "to be made",
        "note": "text file 'x' does not exist",
    }.items():  # fmt: skip
        assert expected in line_with(name, lines), name
    assert "fedcba9876543210" in line_with("numpydocs pruned", lines)


def test_a_time_is_told_if_something_like_it_was_made_before() -> None:
    assert "no estimate: nothing like this" in line_with("time", printed(expected_seconds=None))
    assert not any("time" in line for line in printed(num_missing=0))


def test_an_estimate_is_marked_as_one_and_stands_beside_what_was_measured() -> None:
    alone = line_with("time", printed(expected_seconds=None, estimated_seconds=2 * 3600.0))
    assert "2.0 h  calibration, at least: an estimate" in alone
    both = printed(estimated_seconds=90.0)
    assert "2.5 min" in line_with("time", both) and "1.5 min" in line_with("at least", both)


def test_a_masked_checkpoint_holds_everything() -> None:
    assert "40,000  parameters: what is removed becomes zeros" in line_with(
        "checkpoint", printed(form="masked")
    )
    assert not any("checkpoint" in line for line in printed())


def test_what_is_not_known_is_said() -> None:
    lines = printed(activation_bytes=None, calibration_flops=None, stages=[], notes=[])
    assert "not known for this family" in line_with("activations", lines)
    assert "not known for this family" in line_with("calibration", lines)
