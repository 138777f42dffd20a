"""The table at the end of a run.

In: a run's summary, as in summary.json. Out: text on the console.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.table import Table

from heapr.artifacts import CHECKPOINT
from heapr.report.terminal import open_console, print_lines
from heapr.words import step_title

SIZE_ROWS = {  # size on the model: its share removed, how to print it
    "parameters": ("parameters_removed_ratio", "{:,.0f}"),
    "parameters_active_per_token": ("parameters_active_removed_ratio", "{:,.0f}"),
    "atomic_experts": ("atomic_experts_removed_ratio", "{:,.0f}"),
    "bytes": ("bytes_removed_ratio", "{:,.0f}"),
    "flops_per_token": ("flops_removed_ratio", "{:,.0f}"),
    "flops_per_token_routed": ("flops_routed_removed_ratio", "{:,.0f}"),
}
ZEROS = "parameters_zero"  # of a masked model: what its checkpoint holds for what was removed

COMPARISON_ROWS = {  # beginning of a comparison's name: how to print it
    "kl_to_dense/": "{:.4f}",
    "top1_agreement/": "{:.1%}",
    "truth/spearman": "{:.3f}",
    "truth/pearson": "{:.3f}",
}
SPEED_ROWS = ("prefill_tokens_per_second", "decode_tokens_per_second")
# Which forward of the experts a row of speeds is of: the contestants' names (heapr/evaluation/throughput.py).
FORWARDS = {
    "same loop": ("dense", "pruned"),
    "own way": ("dense_default", "pruned_default"),
}


def print_summary(summary: Mapping[str, Any], run_folder: str, console: Console | None = None) -> None:
    """Dense against pruned, the stages, and where everything lies."""
    artifacts = Path(summary["stages"][0]["path"]).parents[1]
    places = f"artifacts:  {artifacts}/<stage>/<artifact>\nthis run:   {run_folder}"
    checkpoints = dict.fromkeys(
        Path(stage["path"]) / CHECKPOINT for stage in summary["stages"] if stage["stage"] == "prune"
    )
    places += "".join(f"\ncheckpoint: {path}" for path in checkpoints if path.is_dir())
    console = console or open_console()
    console.print(Group(_metrics_table(summary["metrics"]), _stages_table(summary["stages"])))
    print_lines(console, places)


def _metrics_table(metrics: Mapping[str, Mapping[str, float]]) -> Table:
    table = Table("dense against pruned", "dense", "pruned", "change", box=SIMPLE_HEAD)
    for column in table.columns[1:]:
        column.justify = "right"
    _add_models(table, metrics["dense"], metrics["pruned"], metrics["size"])
    _add_comparison(table, metrics["comparison"])
    if not table.rows:
        table.add_row("atomic experts", "", "", f"{-metrics['size']['atomic_experts_removed_ratio']:+.1%}")
    return table


def _add_models(
    table: Table, dense: Mapping[str, float], pruned: Mapping[str, float], size: Mapping[str, float]
) -> None:
    for name in dense:
        if name.startswith("perplexity/"):
            table.add_row(
                name, f"{dense[name]:.2f}", f"{pruned[name]:.2f}", f"{pruned[name] / dense[name] - 1:+.1%}"
            )
    accuracies = [name for name in dense if name.startswith("accuracy/")]
    for name in accuracies:
        if name != "accuracy/average" or len(accuracies) > 2:  # of one task it is that task's
            table.add_row(
                name,
                f"{dense[name]:.1%}",
                f"{pruned[name]:.1%}",
                f"{100 * (pruned[name] - dense[name]):+.1f} points",
            )
    for name, (ratio, form) in SIZE_ROWS.items():
        if name in dense:
            # Never -0.0%.
            table.add_row(
                name, form.format(dense[name]), form.format(pruned[name]), f"{0.0 - size[ratio]:+.1%}"
            )
        if name == "parameters" and pruned.get(ZEROS):
            table.add_row(ZEROS, f"{dense.get(ZEROS, 0):,.0f}", f"{pruned[ZEROS]:,.0f}", "of these")


def _add_comparison(table: Table, comparison: Mapping[str, float]) -> None:
    for name in SPEED_ROWS:
        for forward, contestants in FORWARDS.items():
            speeds = [comparison.get(f"{name}/{contestant}") for contestant in contestants]
            # A ragged model's own way is the loop.
            dense, pruned = (
                speeds[0],
                speeds[1] or comparison.get(f"{name}/pruned"),
            )
            if dense and pruned:
                table.add_row(
                    f"{name}, {forward}", f"{dense:,.0f}", f"{pruned:,.0f}", f"{pruned / dense - 1:+.1%}"
                )
    for beginning, form in COMPARISON_ROWS.items():
        for name in comparison:
            if name.startswith(beginning):
                table.add_row(name, "", form.format(comparison[name]), "")


def _stages_table(stages: list[Mapping[str, Any]]) -> Table:
    table = Table(
        "stage",
        "",
        "seconds",
        "peak memory",
        "artifact",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    table.columns[0].no_wrap = table.columns[4].no_wrap = True
    for column in table.columns[2:4]:
        column.justify = "right"
    for stage in stages:
        name = step_title(stage["stage"], stage["what"])
        peak = "" if stage["cached"] else f"{stage['peak_memory_bytes'] / 2**30:.2f} GiB"
        table.add_row(
            name, "cached" if stage["cached"] else "made", f"{stage['seconds']:.1f}", peak, stage["key"]
        )
    return table
