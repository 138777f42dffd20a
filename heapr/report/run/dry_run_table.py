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

NOT_KNOWN = "not known for this family"


def print_dry_run(plan: Mapping[str, Any], console: Console | None = None) -> None:
    """Model, what is removed, memory and arithmetic; the artifacts; what is missing."""
    console = console or open_console()
    console.print(Group(_numbers_table(plan), *([_stages_table(plan["stages"])] if plan["stages"] else [])))
    print_lines(console, f"model: {plan['path']}")
    for note in plan["notes"]:
        print_lines(console, f"note: {note}")


def _numbers_table(plan: Mapping[str, Any]) -> Table:
    table = Table("dry run", "", plan["name"], box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.columns[1].justify, table.columns[2].overflow = "right", "fold"
    for rows in (_model_rows(plan), _removed_rows(plan), _cost_rows(plan)):
        for row in rows:
            table.add_row(*row)
        table.add_section()
    return table


Rows = list[tuple[str, str, str]]


def _model_rows(plan: Mapping[str, Any]) -> Rows:
    share = plan["expert_parameters"] / plan["parameters"]
    return [
        ("model", plan["architecture"], ""),
        ("MoE layers", str(plan["num_moe_layers"]), f"of {plan['num_layers']} layers"),
        ("experts", _range(plan["num_experts"]), f"of a layer, {plan['experts_per_token']} per token"),
        ("width", _range(plan["width"]), "atomic experts of an expert"),
        ("atomic experts", f"{plan['atomic_experts']:,}", ""),
        ("parameters", f"{plan['parameters']:,}", f"{share:.1%} in routed experts"),
    ]


def _removed_rows(plan: Mapping[str, Any]) -> Rows:
    atomic, removed = plan["atomic_experts_removed"], plan["parameters_removed"]
    if atomic is None:
        return [
            (
                "removed",
                f"{plan['ratio']:.1%}",
                f"of the routed experts' {plan['budget']}; scores say how many atomic experts",
            )
        ]
    of_experts, of_all = removed / plan["expert_parameters"], removed / plan["parameters"]
    return [
        ("removed", f"{atomic:,}", f"atomic experts, {atomic / plan['atomic_experts']:.1%}"),
        ("", f"{removed:,}", f"parameters, {of_all:.1%} ({of_experts:.1%} of experts')"),
        ("left", f"{plan['parameters'] - removed:,}", "parameters"),
        *(
            [("checkpoint", f"{plan['parameters']:,}", "parameters: what is removed becomes zeros")]
            if plan["form"] == "masked"
            else []
        ),
    ]


def _cost_rows(plan: Mapping[str, Any]) -> Rows:
    activations, flops = plan["activation_bytes"], plan["calibration_flops"]
    fixed = plan["weight_bytes"] + plan["statistics_bytes"]
    batch = f"a batch of {plan['batch_size']} x {plan['sequence_length']:,} tokens"
    rows = [
        ("weights", _size(plan["weight_bytes"]), plan["dtype"]),
        (
            "statistics",
            _size(plan["statistics_bytes"]),
            f"in place of {_size(plan['matrix_bytes'])} of matrices (D, D)",
        ),
    ]
    if activations is None or flops is None:
        return [*rows, ("activations", "", NOT_KNOWN), ("calibration", "", NOT_KNOWN)]
    return [
        *rows,
        ("activations", _size(activations), batch),
        ("together", _size(fixed + activations), "what calibration needs, at least"),
        ("calibration", operations(flops), f"forward and backward of {plan['num_samples']} sequences"),
    ]


def _stages_table(stages: Sequence[Mapping[str, Any]]) -> Table:
    table = Table("stage", "", "artifact", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.columns[0].no_wrap = table.columns[2].no_wrap = True
    for stage in stages:
        table.add_row(
            step_title(stage["stage"], stage["what"]),
            "cached" if stage["cached"] else "to be made",
            stage["key"],
        )
    return table


def _range(ends: Sequence[int]) -> str:
    return f"{ends[0]:,}" if ends[0] == ends[1] else f"{ends[0]:,} to {ends[1]:,}"


def _size(num_bytes: int) -> str:
    unit, name = (2**30, "GiB") if num_bytes >= 2**30 else (2**20, "MiB")
    return f"{num_bytes / unit:,.2f} {name}"
