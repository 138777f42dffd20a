"""The final table shows what matters."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from heapr.report.run.console import print_summary


def stage(name: str, **values: object) -> dict[str, object]:
    return {"stage": name, "what": "", "path": f"o/{name}/{values['key']}", **values}


SUMMARY = {
    "metrics": {
        "dense": {
            "perplexity/pydocs": 20.0,
            "accuracy/piqa": 0.75,
            "accuracy/average": 0.75,
            "loop_rate_greedy/pydocs": 0.125,
            "loop_rate_greedy_stderr/pydocs": 0.0333,
            "length_sampled/pydocs": 63.94,
            "parameters": 2000.0,
            "flops_per_token": 10.0,
        },
        "pruned": {
            "perplexity/pydocs": 21.0,
            "accuracy/piqa": 0.7,
            "accuracy/average": 0.7,
            "loop_rate_greedy/pydocs": 0.25,
            "loop_rate_greedy_stderr/pydocs": 0.0444,
            "length_sampled/pydocs": 60.0,
            "parameters": 1500.0,
            "flops_per_token": 9.0,
        },
        "size": {
            "parameters_removed_ratio": 0.25,
            "flops_removed_ratio": 0.1,
            "atomic_experts_removed_ratio": 0.3,
        },
        "comparison": {
            "kl_to_dense/pydocs": 0.0312,
            "top1_agreement/pydocs": 0.9134,
            "greedy_agreement/pydocs": 0.4321,
            "prefill_tokens_per_second/dense": 9000.0,
            "prefill_tokens_per_second/pruned": 9900.0,
            "prefill_tokens_per_second/dense_default": 12000.0,
        },
    },
    "stages": [
        stage("calibrate", key="abc", cached=False, seconds=12.34, peak_memory_bytes=2**30),
        stage("score", key="def", cached=True, seconds=0.01, peak_memory_bytes=0),
        stage("prune", key="ghi", cached=True, seconds=0.01, peak_memory_bytes=0),
    ],
}


def test_table_holds_metrics_change_seconds_memory_and_places() -> None:
    console = Console(width=120, record=True, quiet=False, file=io.StringIO())
    print_summary(SUMMARY, "outputs/runs/now", console)
    text = console.export_text()
    for expected in (
        "20.00",
        "21.00",
        "+5.0%",
        "accuracy/piqa",
        "75.00%",
        "70.00%",
        "-5.00 points",
        "2,000",
        "1,500",
        "-25.0%",
        "-10.0%",
        "12.3",
        "1.00 GiB",
        "cached",
        "abc",
        "o/<stage>",
        "outputs/runs/now",
        "12.5%",
        "+12.5 points",
        "63.9",
        "-3.9",
        "43.2%",
        "0.0312",
        "91.3%",
        "9,000",
        "9,900",
        "+10.0%",
        "prefill_tokens_per_second, as loaded",
        "12,000",
        "-17.5%",  # a ragged model's own way is the loop
    ):
        assert expected in text
    assert "average" not in text  # of one task
    assert "stderr" not in text


def test_a_masked_model_saves_nothing_and_its_zeros_are_named() -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    dense, pruned = (
        {"parameters": 2000.0, "parameters_zero": 0.0},
        {"parameters": 2000.0, "parameters_zero": 500.0},
    )
    metrics = {"dense": dense, "pruned": pruned, "size": {"parameters_removed_ratio": 0.0}, "comparison": {}}
    print_summary({**SUMMARY, "metrics": metrics}, "outputs/runs/now", console)
    lines = [line.split() for line in console.export_text().splitlines()]
    assert ["parameters", "2,000", "2,000", "+0.0%"] in lines
    assert ["parameters_zero", "0", "500", "of", "these"] in lines


def test_the_average_of_several_tasks_is_shown() -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    metrics = {"accuracy/a": 0.5, "accuracy/b": 0.7, "accuracy/average": 0.6}
    summary = {**SUMMARY, "metrics": {"dense": metrics, "pruned": metrics, "size": {}, "comparison": {}}}
    print_summary(summary, "outputs/runs/now", console)
    assert "accuracy/average" in console.export_text()


def test_names_and_keys_are_whole_on_a_narrow_terminal() -> None:
    long = {
        **stage("evaluate", key="0123456789abcdef", cached=False, seconds=12.3, peak_memory_bytes=2**30),
        "what": "perplexity/numpydocs pruned",
    }
    console = Console(width=80, record=True, file=io.StringIO())
    print_summary({**SUMMARY, "stages": [long]}, "outputs/runs/now", console)
    assert any(
        "perplexity/numpydocs pruned" in line and "0123456789abcdef" in line
        for line in console.export_text().splitlines()
    )


def test_paths_are_broken_nowhere() -> None:
    """On a narrow terminal it is the terminal that wraps, and what is copied from it is one line."""
    console, folder = (
        Console(width=40, record=True, file=io.StringIO()),
        "outputs/a folder with blanks/and_a_name_of_many_letters/now",
    )
    print_summary(
        {**SUMMARY, "stages": [{**SUMMARY["stages"][0], "path": f"{folder}/calibrate/abc"}]}, folder, console
    )
    lines = console.export_text().splitlines()
    assert f"this run:   {folder}" in lines and f"artifacts:  {folder}/<stage>/<artifact>" in lines


def test_steps_have_names_of_their_own_and_a_checkpoint_is_named_once(tmp_path: Path) -> None:
    """Plan, repair and checkpoint lie in one folder."""
    (tmp_path / "checkpoint").mkdir()
    made = {"path": str(tmp_path), "key": "k", "cached": False, "seconds": 1.0, "peak_memory_bytes": 0}
    names = [
        ("calibrate", ""),
        ("calibrate", "round 2"),
        ("prune", "round 2"),
        ("prune", "round 2 repair"),
        ("prune", "checkpoint"),
    ]
    stages = [{"stage": name, "what": what, **made} for name, what in names]
    console = Console(width=200, record=True, file=io.StringIO())
    print_summary({**SUMMARY, "stages": stages}, "runs/now", console)
    text = console.export_text()
    assert text.count(str(tmp_path / "checkpoint")) == 1
    for name in (
        "calibrate  ",
        "calibrate round 2  ",
        "prune round 2  ",
        "prune round 2 repair",
        "prune checkpoint",
    ):
        assert name in text
