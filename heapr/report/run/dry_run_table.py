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

DryRun = Mapping[str, Any]  # its numbers, by name
Rows = list[tuple[str, str, str]]  # what it is, number, remark

NOT_KNOWN = "not known for this family"
# Of streamed stages: name of the number, what it is, remark.
STREAMED = (
    ("bytes_read", "read", "of the model's files"),
    ("tape_bytes", "on disk", "activations between the layers, meanwhile"),
)


def print_dry_run(plan: DryRun, console: Console | None = None) -> None:
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


def _numbers_table(plan: DryRun) -> Table:
    table = Table("dry run", "", plan["name"], box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.columns[1].justify = "right"
    table.columns[2].overflow = "fold"
    sections = (_model_rows(plan), _removed_rows(plan), _cost_rows(plan))
    for rows in sections:
        for row in rows:
            table.add_row(*row)
        table.add_section()
    return table


def _model_rows(plan: DryRun) -> Rows:
    parameters = plan["parameters"]
    of_experts = _percent(plan["expert_parameters"] / parameters)
    layers = str(plan["num_moe_layers"])
    num_experts = _range(plan["num_experts"])
    width = _range(plan["width"])
    return [
        ("model", plan["architecture"], ""),
        ("MoE layers", layers, f"of {plan['num_layers']} layers"),
        ("experts", num_experts, f"of a layer, {plan['experts_per_token']} per token"),
        ("width", width, "atomic experts of an expert"),
        ("atomic experts", _count(plan["atomic_experts"]), ""),
        ("parameters", _count(parameters), f"{of_experts} in routed experts"),
    ]


def _removed_rows(plan: DryRun) -> Rows:
    """Say what is removed and left: the share of FLOPs alone if only scores tell how many atomic experts."""
    atomic = plan["atomic_experts_removed"]
    if atomic is None:
        remark = f"of the routed experts' {plan['budget']}; scores say how many atomic experts"
        return [("removed", _percent(plan["ratio"]), remark)]
    before = plan["parameters"]
    removed = plan["parameters_removed"]
    left = before - removed
    of_atomic = _percent(atomic / plan["atomic_experts"])
    of_experts = _percent(removed / plan["expert_parameters"])
    of_all = _percent(removed / before)
    rows = [
        ("removed", _count(atomic), f"atomic experts, {of_atomic}"),
        ("", _count(removed), f"parameters, {of_all} ({of_experts} of experts')"),
        ("left", _count(left), "parameters"),
    ]
    if plan["form"] == "masked":
        rows.append(("checkpoint", _count(before), "parameters: what is removed becomes zeros"))
    return rows


def _cost_rows(plan: DryRun) -> Rows:
    """Predicted memory and arithmetic of calibration, then the time of what is missing."""
    weights = plan["weight_bytes"]
    statistics = plan["statistics_bytes"]
    matrices = _size(plan["matrix_bytes"])
    activations = plan["activation_bytes"]
    flops = plan["calibration_flops"]
    rows = [
        ("weights", _size(weights), plan["dtype"]),
        ("statistics", _size(statistics), f"in place of {matrices} of matrices (D, D)"),
    ]
    if activations is None or flops is None:
        rows.append(("activations", "", NOT_KNOWN))
        arithmetic = ("calibration", "", NOT_KNOWN)
    else:
        together = weights + statistics + activations
        length = _count(plan["sequence_length"])
        batch = f"a batch of {plan['batch_size']} x {length} tokens"
        passes = f"forward and backward of {plan['num_samples']} sequences"
        rows.append(("activations", _size(activations), batch))
        rows.append(("together", _size(together), "what calibration in memory needs, at least"))
        arithmetic = ("calibration", operations(flops), passes)
    rows += _memory_rows(plan)
    rows.append(arithmetic)
    rows += _time_rows(plan)
    return rows


def _memory_rows(plan: DryRun) -> Rows:
    """Predicted memory of the stages as they will be run; read and written bytes if they are streamed."""
    rows: Rows = []
    label = "peak memory"
    for stage, memory in plan["peak_memory"].items():
        total = sum(memory.values())
        parts = [f"{name} {_size(size)}" for name, size in memory.items()]
        listed = ", ".join(parts)
        rows.append((label, _size(total), f"{stage}: {listed}"))
        label = ""
    for name, label, remark in STREAMED:
        num_bytes = plan[name]
        if num_bytes is not None:
            rows.append((label, _size(num_bytes), remark))
    return rows


def _time_rows(plan: DryRun) -> Rows:
    """Time of what is missing from the store, as far as something like it was made before."""
    seconds, estimated, num_missing = plan["expected_seconds"], plan["estimated_seconds"], plan["num_missing"]
    rows: Rows = []
    if num_missing == 0:
        return rows
    if seconds is not None:
        remark = f"for {plan['num_expected']} of {num_missing} to be made, by earlier ones like them"
        rows.append(("time", _time(seconds), remark))
    if estimated is not None:
        label = "" if rows else "time"
        remark = "calibration, at least: an estimate by this machine's speed"
        rows.append((label, _time(estimated), remark))
    return rows or [("time", "", "no estimate: nothing like this was made here before")]


def _time(seconds: float) -> str:
    minutes = seconds / 60
    if minutes < 1:
        return f"{seconds:.1f} s"
    return f"{minutes:.1f} min" if minutes < 60 else f"{minutes / 60:.1f} h"


def _stages_table(stages: Sequence[Mapping[str, Any]]) -> Table:
    table = Table("stage", "", "artifact", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.columns[0].no_wrap = table.columns[2].no_wrap = True
    for stage in stages:
        title = step_title(stage["stage"], stage["what"])
        state = "cached" if stage["cached"] else "to be made"
        table.add_row(title, state, stage["key"])
    return table


def _range(ends: Sequence[int]) -> str:
    least, most = map(_count, ends)
    return least if least == most else f"{least} to {most}"


def _count(number: int) -> str:
    return f"{number:,}"


def _percent(share: float) -> str:
    return f"{share:.1%}"


def _size(num_bytes: int) -> str:
    mebibytes = num_bytes / 2**20
    if mebibytes < 1024:
        return f"{mebibytes:,.2f} MiB"
    return f"{mebibytes / 1024:,.2f} GiB"
