"""The picture of the architecture, as a test: which part may import which, and what no part may do."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "heapr"

# What each part may import of the package, besides the ground floor.
GROUND = {"types", "schema", "errors", "files", "measure", "progress", "tracking", "report"}
ALLOWED: dict[str, set[str]] = {
    "store": set(),
    "score": set(),
    "model": set(),
    "calibration": {"model"},
    "pruning": {"model"},
    "evaluation": {"model", "calibration"},
    "recipes": {"store", "calibration", "evaluation"},
    "pipeline": {"store", "recipes", "model", "score", "calibration", "pruning", "evaluation"},
    "main": {"pipeline"},
}


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(PACKAGE)) for path in FILES])
def test_arrows_point_one_way(path: Path) -> None:
    part = part_of(path)
    if part == "__init__":
        return
    imported = {name.split(".")[1] for name in imports_of(path) if name.startswith("heapr.")}
    allowed = GROUND | {part} | ALLOWED.get(part, set())
    assert part in GROUND | ALLOWED.keys(), f"{part} has no place in the picture"
    assert imported <= allowed, f"{part} may not import {imported - allowed}"


def test_score_and_allocation_know_only_types_and_torch() -> None:
    for path in [*PACKAGE.glob("score/*.py"), PACKAGE / "pruning" / "allocation.py"]:
        third_party = {name.split(".")[0] for name in imports_of(path)} - {"torch", "heapr", "__future__"}
        assert third_party <= {"collections", "typing", "math", "itertools"}, path


def test_the_schema_is_light_and_only_the_top_knows_hydra() -> None:
    assert not any(name.startswith("torch") for name in imports_of(PACKAGE / "schema.py"))
    for path in FILES:
        if any(name.split(".")[0] in {"hydra", "omegaconf"} for name in imports_of(path)):
            assert part_of(path) in {"schema", "main"}, path


def test_no_family_is_named_outside_the_model_folder() -> None:
    families = ("qwen", "mixtral", "deepseek", "olmoe", "gpt_oss", "llama")
    for path in FILES:
        if part_of(path) != "model":
            code = path.read_text().lower()
            assert not any(family in code for family in families), path


def test_nothing_reads_outside_the_repository() -> None:
    for path in [*FILES, *PACKAGE.parent.glob("conf/**/*.yaml"), PACKAGE.parent / "run.py"]:
        assert "../shared" not in path.read_text(), path
