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
from rich.text import Text

SIZE_ROWS = {  # size on the model: its share removed, how to print it
    "parameters": ("parameters_removed_ratio", "{:,.0f}"),
    "atomic_experts": ("atomic_experts_removed_ratio", "{:,.0f}"),
    "bytes": ("bytes_removed_ratio", "{:,.0f}"),
    "flops_per_token": ("flops_removed_ratio", "{:,.0f}"),
}


def print_summary(summary: Mapping[str, Any], run_folder: str, console: Console | None = None) -> None:
    """Dense against pruned, the stages, and where everything lies."""
    artifacts = Path(summary["stages"][0]["path"]).parents[1]
    places = Text(f"artifacts: {artifacts}/<stage>/<artifact>\nthis run:  {run_folder}", overflow="fold")
    (console or Console()).print(Group(_metrics_table(summary["metrics"]), _stages_table(summary["stages"]), places))


def _metrics_table(metrics: Mapping[str, Mapping[str, float]]) -> Table:
    dense, pruned, size = metrics["dense"], metrics["pruned"], metrics["size"]
    table = Table("dense against pruned", "dense", "pruned", "change", box=SIMPLE_HEAD)
    for column in table.columns[1:]:
        column.justify = "right"
    for name in dense:
        if name.startswith("perplexity/"):
            table.add_row(name, f"{dense[name]:.2f}", f"{pruned[name]:.2f}", f"{pruned[name] / dense[name] - 1:+.1%}")
    accuracies = [name for name in dense if name.startswith("accuracy/")]
    for name in accuracies:
        if name != "accuracy/average" or len(accuracies) > 2:  # of one task it is that task's
            table.add_row(name, f"{dense[name]:.1%}", f"{pruned[name]:.1%}", f"{100 * (pruned[name] - dense[name]):+.1f} points")
    for name, (ratio, form) in SIZE_ROWS.items():
        if name in dense:
            table.add_row(name, form.format(dense[name]), form.format(pruned[name]), f"{-size[ratio]:+.1%}")
    if not table.rows:
        table.add_row("atomic experts", "", "", f"{-size['atomic_experts_removed_ratio']:+.1%}")
    return table


def _stages_table(stages: list[Mapping[str, Any]]) -> Table:
    table = Table("stage", "", "seconds", "peak memory", "artifact", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.columns[0].no_wrap = table.columns[4].no_wrap = True
    for column in table.columns[2:4]:
        column.justify = "right"
    for stage in stages:
        name = stage["what"] or stage["stage"]
        peak = "" if stage["cached"] else f"{stage['peak_memory_bytes'] / 2**30:.2f} GiB"
        table.add_row(name, "cached" if stage["cached"] else "made", f"{stage['seconds']:.1f}", peak, stage["key"])
    return table
