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

Numbers = Mapping[str, float]  # metrics by name

# From a size of the model to the name of its share removed.
SIZE_ROWS = {
    "parameters": "parameters_removed_ratio",
    "parameters_active_per_token": "parameters_active_removed_ratio",
    "atomic_experts": "atomic_experts_removed_ratio",
    "bytes": "bytes_removed_ratio",
    "flops_per_token": "flops_removed_ratio",
    "flops_per_token_routed": "flops_routed_removed_ratio",
}
ZEROS = "parameters_zero"  # zeros in a masked model's checkpoint, in place of what was removed

# From the beginning of a comparison's name to its format.
COMPARISON_ROWS = {
    "kl_to_dense/": "{:.4f}",
    "top1_agreement/": "{:.1%}",
    "greedy_agreement/": "{:.1%}",
    "truth/spearman": "{:.3f}",
    "truth/pearson": "{:.3f}",
}
AVERAGE = "accuracy/average"
# Shares of continuations or n-grams (heapr/evaluation/generation.py), and numbers of tokens.
GENERATION_SHARES = ("loop_rate_greedy/", "loop_rate_sampled/", "distinct_ngrams_")
GENERATION_LENGTHS = "length_"
SPEED_ROWS = ("prefill_tokens_per_second", "decode_tokens_per_second")
# From the forward that the experts use to its contestants (heapr/evaluation/throughput.py): dense and pruned.
FORWARDS = {
    "heapr's loop": ("dense", "pruned"),
    "as loaded": ("dense_default", "pruned_default"),
}


def print_summary(summary: Mapping[str, Any], run_folder: str, console: Console | None = None) -> None:
    """Print dense against pruned, the stages, and where everything lies.

    Args:
        summary: as in summary.json.
        run_folder: of the run.
        console: to print on; standard output by default.
    """
    stages = summary["stages"]
    artifacts = Path(stages[0]["path"]).parents[1]
    places = [
        f"artifacts:  {artifacts}/<stage>/<artifact>",
        f"this run:   {run_folder}",
    ]
    plans = dict.fromkeys(stage["path"] for stage in stages if stage["stage"] == "prune")
    for plan in plans:
        checkpoint = Path(plan) / CHECKPOINT
        if checkpoint.is_dir():
            places.append(f"checkpoint: {checkpoint}")
    tables = Group(_metrics_table(summary["metrics"]), _stages_table(stages))
    console = console or open_console()
    console.print(tables)
    print_lines(console, "\n".join(places))


def _metrics_table(metrics: Mapping[str, Numbers]) -> Table:
    table = Table("dense vs. pruned", "dense", "pruned", "change", box=SIMPLE_HEAD)
    for column in table.columns[1:]:
        column.justify = "right"
    _add_models(table, metrics["dense"], metrics["pruned"], metrics["size"])
    _add_comparison(table, metrics["comparison"])
    if not table.rows:
        removed = metrics["size"]["atomic_experts_removed_ratio"]
        table.add_row("atomic experts", "", "", _change(-removed))
    return table


def _add_models(table: Table, dense: Numbers, pruned: Numbers, size: Numbers) -> None:
    """Add the metrics that both models have: perplexities, accuracies, continuations, then sizes."""
    perplexities = [name for name in dense if name.startswith("perplexity/")]
    for name in perplexities:
        before = dense[name]
        after = pruned[name]
        change = after / before - 1
        table.add_row(name, f"{before:.2f}", f"{after:.2f}", _change(change))
    for name in _accuracies(dense):
        _add_share(table, name, dense[name], pruned[name], decimals=2)
    for name in _of_generation(dense):
        before = dense[name]
        after = pruned[name]
        if name.startswith(GENERATION_LENGTHS):
            difference = after - before
            table.add_row(name, f"{before:.1f}", f"{after:.1f}", f"{difference:+.1f}")
        else:
            _add_share(table, name, before, after, decimals=1)
    _add_sizes(table, dense, pruned, size)


def _add_sizes(table: Table, dense: Numbers, pruned: Numbers, size: Numbers) -> None:
    """Add sizes with their change, and below the parameters how many of them are zeros."""
    for name, ratio in SIZE_ROWS.items():
        if name in dense:
            before = _count(dense[name])
            after = _count(pruned[name])
            # A difference, so that nothing removed is +0.0% and not -0.0%.
            change = 0.0 - size[ratio]
            table.add_row(name, before, after, _change(change))
        if name == "parameters" and pruned.get(ZEROS):
            before = _count(dense.get(ZEROS, 0))
            after = _count(pruned[ZEROS])
            table.add_row(ZEROS, before, after, "of these")


def _add_share(table: Table, name: str, before: float, after: float, *, decimals: int) -> None:
    points = 100 * (after - before)
    dense = f"{before:.{decimals}%}"
    pruned = f"{after:.{decimals}%}"
    change = f"{points:+.{decimals}f} points"
    table.add_row(name, dense, pruned, change)


def _of_generation(dense: Numbers) -> list[str]:
    """Return the names of what describes continuations, without standard errors."""
    kinds = (*GENERATION_SHARES, GENERATION_LENGTHS)
    return [name for name in dense if name.startswith(kinds) and "_stderr/" not in name]


def _accuracies(dense: Numbers) -> list[str]:
    """Return the names of the accuracies; the average of one task is that task's accuracy."""
    names = [name for name in dense if name.startswith("accuracy/")]
    of_tasks = [name for name in names if name != AVERAGE]
    return names if len(of_tasks) > 1 else of_tasks


def _add_comparison(table: Table, comparison: Numbers) -> None:
    """Add speeds of both models by the forward that the experts use, then distances between the models."""
    for name in SPEED_ROWS:
        for forward, (dense_contestant, pruned_contestant) in FORWARDS.items():
            dense = comparison.get(f"{name}/{dense_contestant}")
            # A ragged model has no other forward than the loop.
            loop = comparison.get(f"{name}/pruned")
            pruned = comparison.get(f"{name}/{pruned_contestant}") or loop
            if dense and pruned:
                before = _count(dense)
                after = _count(pruned)
                change = pruned / dense - 1
                table.add_row(f"{name}, {forward}", before, after, _change(change))
    for beginning, form in COMPARISON_ROWS.items():
        names = [name for name in comparison if name.startswith(beginning)]
        for name in names:
            number = form.format(comparison[name])
            table.add_row(name, "", number, "")


def _count(number: float) -> str:
    return f"{number:,.0f}"


def _change(share: float) -> str:
    return f"{share:+.1%}"


def _stages_table(stages: list[Mapping[str, Any]]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("stage", no_wrap=True)
    table.add_column("")
    table.add_column("seconds", justify="right")
    table.add_column("peak memory", justify="right")
    table.add_column("artifact", no_wrap=True)
    for stage in stages:
        title = step_title(stage["stage"], stage["what"])
        seconds = f"{stage['seconds']:.1f}"
        if stage["cached"]:
            state, peak = "cached", ""
        else:
            gibibytes = stage["peak_memory_bytes"] / 2**30
            state, peak = "made", f"{gibibytes:.2f} GiB"
        table.add_row(title, state, seconds, peak, stage["key"])
    return table
