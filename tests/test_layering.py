"""The picture of the architecture, as a test: which part may import which, and what no part may do."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from heapr.model import modelling_file

PACKAGE = Path(__file__).parents[1] / "heapr"

# What each part may import of the package, besides itself. The order is that of the floors.
ALLOWED: dict[str, set[str]] = {
    "definitions": set(),
    "errors": set(),
    "words": set(),
    "files": {"errors"},
    "machine_speed": set(),
    "limits": {"errors", "files"},
    "targets": {"errors"},
    "secrets": {"errors"},
    "arguments": {"errors"},
    "inputs": {"errors", "files"},
    "hydra_folders": {"errors"},
    "composition": {"definitions", "errors", "files", "hydra_folders", "secrets", "targets"},
    "measure": set(),
    "origin": set(),
    "network": set(),
    "log_file": set(),
    "sealed": set(),
    "remembered_hashes": {"files", "sealed"},
    "os_errors": {"errors"},
    "overrides": {"definitions", "errors"},
    "progress": set(),
    "tensors_file": set(),
    "types": set(),
    "hub": {"network"},
    "artifacts": {"errors", "files", "tensors_file", "types", "words"},
    "plugins": {"errors", "limits", "targets", "words"},
    "unknown_keys": {"errors", "words"},
    "schema": {"errors", "files", "limits", "targets", "unknown_keys"},
    "compose_experiment": {"overrides", "schema"},
    "saved_run": {"errors"},
    "report": {"artifacts", "errors", "files", "words"},
    "tracking": {"arguments", "errors", "network", "schema", "words"},
    "locks": {"errors", "files"},
    "signals": set(),
    "unread_output": set(),
    "lifelines": set(),
    "rank_environment": {"errors"},
    "ranks": set(),
    "process_group": {"errors", "lifelines", "rank_environment", "ranks", "signals", "words"},
    "shared_folder": {"errors", "ranks"},
    "start_ranks": {"process_group", "rank_environment", "ranks"},
    "store": {"arguments", "secrets", "artifacts", "errors", "files", "locks", "measure", "origin", "os_errors", "ranks", "remembered_hashes", "report", "sealed", "shared_folder", "signals", "unread_output", "words"},
    "text": {"inputs", "errors", "files", "hub", "limits", "plugins", "progress", "types", "words"},
    "score": {"errors", "types"},
    "model": {"inputs", "errors", "files", "hub", "progress", "remembered_hashes", "sealed", "tensors_file", "types", "words", "ranks"},
    "calibration": {"model", "types", "ranks"},
    "pruning": {"errors", "files", "model", "progress", "types", "ranks"},
    "evaluation": {
        "errors", "files", "hub", "measure", "plugins", "progress", "types", "words", "text", "score", "model", "calibration", "pruning", "ranks",
    },
    "steps": {"artifacts", "origin", "schema", "store", "text", "evaluation"},
    "step_results": {"artifacts", "steps", "store", "types"},
    "stage_memory": {"artifacts", "model"},
    "placement": {"errors", "model", "origin", "ranks", "schema", "stage_memory", "steps", "types"},
    "experiment": {"evaluation", "model", "placement", "pruning", "ranks", "schema", "score", "steps", "store", "text", "words"},
    "objective": {"errors", "evaluation", "types", "words"},
    "prepare": {"artifacts", "errors", "evaluation", "experiment", "measure", "model", "objective", "placement", "plugins", "pruning", "ranks", "schema", "score", "shared_folder", "steps", "store", "text", "types"},
    "ready": {"artifacts", "evaluation", "experiment", "placement", "steps", "text", "types"},
    "past_seconds": {"artifacts", "origin", "store"},
    "provider": {"errors", "ranks", "types", "model", "pruning"},
    "gpu_slots": {"errors", "locks"},
    "push": {"errors", "hub", "words"},
    "findings": {"types", "evaluation"},
    "stages": {"artifacts", "model", "pruning", "types"},
    "pipeline": {"artifacts", "calibration", "errors", "evaluation", "experiment", "findings", "model", "progress", "provider", "pruning", "report", "stages", "step_results", "steps", "store", "text", "tracking", "types"},
    "run_experiment": {"artifacts", "experiment", "gpu_slots", "os_errors", "pipeline", "prepare", "push", "ranks", "ready", "report", "schema", "store", "tracking", "types"},
    "dry_run": {"experiment", "machine_speed", "model", "past_seconds", "placement", "prepare", "pruning", "schema", "stage_memory"},
    "explain": {"overrides", "unknown_keys", "words"},
    "one_line_errors": {"composition", "errors", "explain", "os_errors", "secrets", "signals", "unread_output"},
    "main": {"arguments", "artifacts", "definitions", "dry_run", "errors", "inputs", "objective", "one_line_errors", "overrides", "ranks", "report", "run_experiment", "saved_run", "schema", "secrets", "signals", "start_ranks", "words"},
    "__main__": {"main", "signals"},
    "library": {
        "artifacts", "calibration", "compose_experiment", "definitions", "errors", "evaluation", "experiment", "findings", "model", "overrides", "plugins", "prepare",
        "progress", "provider", "pruning", "report", "schema", "score", "stages", "steps", "text", "types", "words",
    },
    "sweep": {"artifacts", "compose_experiment", "composition", "definitions", "dry_run", "errors", "explain", "files", "model", "one_line_errors", "origin", "overrides", "past_seconds", "prepare", "report", "schema", "signals", "store", "tracking", "unread_output", "words"},
    "prefetch": {"compose_experiment", "definitions", "errors", "evaluation", "hub", "one_line_errors", "overrides", "prepare", "schema", "text"},
}  # fmt: skip


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    """Full names of what a file imports: `from heapr import store` is `heapr.store`."""
    return {name for node in ast.walk(ast.parse(path.read_text())) for name in imported_names(node)}


def is_relative(node: ast.AST) -> bool:
    return isinstance(node, ast.ImportFrom) and node.level > 0


def imported_names(node: ast.AST) -> set[str]:
    if is_relative(node):
        return set()
    if isinstance(node, ast.ImportFrom):
        return {f"{node.module}.{alias.name}" for alias in node.names}
    return {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()


OF_HYDRA = {
    "compose_experiment",
    "composition",
    "explain",
    "limits",
    "main",
    "one_line_errors",
    "overrides",
    "saved_run",
    "schema",
    "sweep",
    "unknown_keys",
}
FILES = sorted(PACKAGE.rglob("*.py"))
PORTABLE = [Path(inspect.getfile(module)) for module in modelling_file.PORTABLE]


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(PACKAGE)) for path in FILES])
def test_arrows_point_one_way(path: Path) -> None:
    part = part_of(path)
    if part == "__init__":
        return
    imported = {name.split(".")[1] for name in imports_of(path) if name.startswith("heapr.")}
    assert part in ALLOWED, f"{part} has no place in the picture"
    assert imported <= ALLOWED[part] | {part}, f"{part} may not import {imported - ALLOWED[part]}"


def test_score_and_allocation_know_only_types_and_torch() -> None:
    allocation = ["budget", "ranking", "rounding"]
    allocation += [path.stem for path in PACKAGE.glob("pruning/allocation*.py")]
    for path in [*PACKAGE.glob("score/*.py"), *(PACKAGE / "pruning" / f"{name}.py" for name in allocation)]:
        names = imports_of(path)
        assert {name.split(".")[0] for name in names} <= {
            "torch",
            "annotated_types",
            "heapr",
            "__future__",
            "collections",
            "dataclasses",
            "enum",
            "re",
            "typing",
            "math",
            "itertools",
        }, path
        ours = {name.split(".")[1] for name in names if name.startswith("heapr.")}
        assert ours <= {"types", "errors", "score" if path.parent.name == "score" else "pruning"}, path
        assert {name.split(".")[2] for name in names if name.startswith("heapr.pruning.")} <= set(
            allocation
        ), path


def test_what_lies_beside_checkpoints_knows_torch_and_itself_alone() -> None:
    """It imports itself relatively, which nothing else does."""
    names = {path.stem for path in PORTABLE}
    for path in FILES:
        relative = [node for node in ast.walk(ast.parse(path.read_text())) if is_relative(node)]
        if path in PORTABLE:
            assert {name.split(".")[0] for name in imports_of(path)} <= {
                *sys.stdlib_module_names,
                "torch",
            }, path
            assert all(node.level == 1 and node.module in names for node in relative), path
        else:
            assert not relative, path


def test_the_picture_has_no_cycle() -> None:
    floors = list(ALLOWED)
    assert all(floors.index(below) < floors.index(part) for part, parts in ALLOWED.items() for below in parts)


def test_the_schema_is_light_and_only_the_top_knows_hydra() -> None:
    assert not any(name.startswith("torch") for name in imports_of(PACKAGE / "schema.py"))
    for path in FILES:
        if any(name.split(".")[0] in {"hydra", "omegaconf"} for name in imports_of(path)):
            assert part_of(path) in OF_HYDRA, path


def test_no_two_files_share_a_name() -> None:
    """A name says what a file is about: whoever searches for it finds one."""
    names = Counter(path.name for path in FILES if path.name not in {"__init__.py", "__main__.py"})
    assert [name for name, number in names.items() if number > 1] == []


def test_slow_libraries_are_imported_where_they_are_needed() -> None:
    for path in FILES:
        names = {
            name.split(".")[0] for node in ast.parse(path.read_text()).body for name in imported_names(node)
        }
        assert not names & {"lm_eval", "datasets", "pyarrow", "wandb", "wandb_workspaces", "matplotlib"}, path


def test_reports_are_made_without_torch() -> None:
    for path in PACKAGE.glob("report/**/*.py"):
        assert not {name.split(".")[0] for name in imports_of(path)} & {"torch", "transformers"}, path


def test_what_reads_names_and_json_starts_without_torch() -> None:
    modules = (
        "heapr.artifacts",
        "heapr.report.sweep.results",
        "heapr.report.sweep.report",
        "heapr.sweep.collect",
        "heapr.sweep.command_line",
        "heapr.store.commands",
    )
    code = (
        f"import sys, {', '.join(modules)}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, check=False).returncode == 0


ARTIFACT_FILES = re.compile(
    r"\b(tokens|statistics|scores|plan|repaired)\.safetensors\b|\b(allocation|repair|metrics|details|manifest|summary)\.json\b"
)


def test_one_module_names_the_files_of_artifacts() -> None:
    """Others may speak of them in a docstring or a message, but build no path."""
    for path in FILES:
        literals = [
            node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)
        ]
        named = [text for text in literals if isinstance(text, str) and ARTIFACT_FILES.fullmatch(text)]
        assert part_of(path) == "artifacts" or not named, (path, named)


def test_no_family_is_named_outside_the_model_folder() -> None:
    families = ("qwen", "mixtral", "deepseek", "olmoe", "gpt_oss", "llama")
    for path in FILES:
        if part_of(path) != "model":
            code = path.read_text().lower()
            assert not any(family in code for family in families), path


def test_nothing_reads_outside_the_repository() -> None:
    for path in [
        *FILES,
        *PACKAGE.parent.glob("conf/**/*.yaml"),
        PACKAGE.parent / "run.py",
        PACKAGE.parent / "sweep.py",
    ]:
        assert "../shared" not in path.read_text(), path
