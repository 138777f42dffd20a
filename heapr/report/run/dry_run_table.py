"""The tables of a dry run.

In: its numbers, as a mapping. Out: text on the console, readable on 80 columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.table import Table

from heapr.report.terminal import open_console, operations, print_lines
from heapr.words import step_title

Rows = list[tuple[str, str, str]]  # what it is, number, remark

NOT_KNOWN = "not known for this family"


def print_dry_run(plan: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the model, what is removed, memory and arithmetic; then the artifacts, and what is missing.

    Args:
        plan: the numbers of a dry run, by name.
        console: to print on; standard output by default.
    """
    console = console or open_console()
    tables = [_numbers_table(plan)]
    if plan["stages"]:
        tables.append(_stages_table(plan["stages"]))
    console.print(Group(*tables))
    print_lines(console, f"model: {plan['path']}")
    for note in plan["notes"]:
        print_lines(console, f"note: {note}")


def _numbers_table(plan: Mapping[str, Any]) -> Table:
    table = Table("dry run", "", plan["name"], box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.columns[1].justify = "right"
    table.columns[2].overflow = "fold"
    for rows in (_model_rows(plan), _removed_rows(plan), _cost_rows(plan)):
        for row in rows:
            table.add_row(*row)
        table.add_section()
    return table


def _model_rows(plan: Mapping[str, Any]) -> Rows:
    layers = str(plan["num_moe_layers"])
    experts = _range(plan["num_experts"])
    width = _range(plan["width"])
    atomic = f"{plan['atomic_experts']:,}"
    parameters = f"{plan['parameters']:,}"
    share = plan["expert_parameters"] / plan["parameters"]
    return [
        ("model", plan["architecture"], ""),
        ("MoE layers", layers, f"of {plan['num_layers']} layers"),
        ("experts", experts, f"of a layer, {plan['experts_per_token']} per token"),
        ("width", width, "atomic experts of an expert"),
        ("atomic experts", atomic, ""),
        ("parameters", parameters, f"{share:.1%} in routed experts"),
    ]


def _removed_rows(plan: Mapping[str, Any]) -> Rows:
    atomic = plan["atomic_experts_removed"]
    if atomic is None:
        remark = f"of the routed experts' {plan['budget']}; scores say how many atomic experts"
        return [("removed", f"{plan['ratio']:.1%}", remark)]
    before, removed = plan["parameters"], plan["parameters_removed"]
    of_atomic = atomic / plan["atomic_experts"]
    of_experts = removed / plan["expert_parameters"]
    of_all = removed / before
    rows = [
        ("removed", f"{atomic:,}", f"atomic experts, {of_atomic:.1%}"),
        ("", f"{removed:,}", f"parameters, {of_all:.1%} ({of_experts:.1%} of experts')"),
        ("left", f"{before - removed:,}", "parameters"),
    ]
    if plan["form"] == "masked":
        rows.append(("checkpoint", f"{before:,}", "parameters: what is removed becomes zeros"))
    return rows


def _cost_rows(plan: Mapping[str, Any]) -> Rows:
    activations, flops = plan["activation_bytes"], plan["calibration_flops"]
    weights, statistics = plan["weight_bytes"], plan["statistics_bytes"]
    matrices = _size(plan["matrix_bytes"])
    rows = [
        ("weights", _size(weights), plan["dtype"]),
        ("statistics", _size(statistics), f"in place of {matrices} of matrices (D, D)"),
    ]
    if activations is None or flops is None:
        unknown = [("activations", "", NOT_KNOWN), *_memory_rows(plan), ("calibration", "", NOT_KNOWN)]
        return [*rows, *unknown, *_time_rows(plan)]
    memory = _memory_rows(plan)
    batch = f"a batch of {plan['batch_size']} x {plan['sequence_length']:,} tokens"
    together = weights + statistics + activations
    return [
        *rows,
        ("activations", _size(activations), batch),
        ("together", _size(together), "what calibration in memory needs, at least"),
        *memory,
        ("calibration", operations(flops), f"forward and backward of {plan['num_samples']} sequences"),
        *_time_rows(plan),
    ]


def _memory_rows(plan: Mapping[str, Any]) -> Rows:
    """Predicted memory of the stages as they will be run; read and written bytes if they are streamed."""
    rows: Rows = []
    for stage, memory in plan["peak_memory"].items():
        parts = ", ".join(f"{name} {_size(size)}" for name, size in memory.items())
        rows.append(("" if rows else "peak memory", _size(sum(memory.values())), f"{stage}: {parts}"))
    if plan["bytes_read"] is not None:
        rows.append(("read", _size(plan["bytes_read"]), "of the model's files"))
    if plan["tape_bytes"] is not None:
        rows.append(("on disk", _size(plan["tape_bytes"]), "activations between the layers, meanwhile"))
    return rows


def _time_rows(plan: Mapping[str, Any]) -> Rows:
    """Time of what is missing from the store, as far as something like it was made before."""
    seconds, num_missing = plan["expected_seconds"], plan["num_missing"]
    if num_missing == 0:
        return []
    if seconds is None:
        return [("time", "", "no estimate: nothing like this was made here before")]
    time = f"{seconds:.1f} s" if seconds < 60 else f"{seconds / 60:.1f} min"
    remark = f"for {plan['num_expected']} of {num_missing} to be made, by earlier ones like them"
    return [("time", time, remark)]


def _stages_table(stages: Sequence[Mapping[str, Any]]) -> Table:
    table = Table("stage", "", "artifact", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.columns[0].no_wrap = table.columns[2].no_wrap = True
    for stage in stages:
        title = step_title(stage["stage"], stage["what"])
        state = "cached" if stage["cached"] else "to be made"
        table.add_row(title, state, stage["key"])
    return table


def _range(ends: Sequence[int]) -> str:
    least, most = ends
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"


def _size(num_bytes: int) -> str:
    if num_bytes >= 2**30:
        return f"{num_bytes / 2**30:,.2f} GiB"
    return f"{num_bytes / 2**20:,.2f} MiB"
