"""What is pinned, declared, imported and known to have holes agrees."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path
from typing import Any

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.command import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = [
    Requirement(line)
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if not line.startswith("#")
]
PYTHONS = ("3.10", "3.11", "3.14")
ADVISORY = re.compile(r"\b(?:CVE-\d{4}-\d+|PYSEC-\d{4}-\d+|GHSA(?:-\w{4}){3})\b")
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
LAUNCHERS = {"joblib", "ray", "slurm"}  # with exact versions of their own
DECLARED = {*PROJECT["dependencies"]}.union(*(EXTRAS[name] for name in EXTRAS.keys() - LAUNCHERS))


def pinned(python: str) -> dict[str, Version]:
    """The version of each package that a Python on Linux installs."""
    environment = {**default_environment(), "python_version": python, "sys_platform": "linux"}
    chosen = [pin for pin in PINS if pin.marker is None or pin.marker.evaluate(environment)]
    names = [canonicalize_name(pin.name) for pin in chosen]
    assert len(set(names)) == len(names), "a package has two pins"
    return {name: Version(next(iter(pin.specifier)).version) for name, pin in zip(names, chosen, strict=True)}


def asked_for(texts: Iterable[str], extra: str = "") -> Iterator[Requirement]:
    """Requirements that hold for this Python."""
    environment = {**default_environment(), "extra": extra}
    requirements = map(Requirement, texts)
    return (one for one in requirements if one.marker is None or one.marker.evaluate(environment))


def asked_by(name: str) -> list[str]:
    """What an installed package requires, but for CUDA's libraries, whose versions torch itself states."""
    try:
        texts = requires(name) or []
    except PackageNotFoundError:
        return []
    return [text for text in texts if not text.startswith(("cuda-", "nvidia-"))]


def imported(folder: Path) -> Iterator[str]:
    """Top-level names of what is imported, also within functions; not what only type checkers see."""
    for path in folder.rglob("*.py"):
        waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
        while waiting:
            node = waiting.pop()
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                waiting.extend(node.orelse)
                continue
            if isinstance(node, ast.Import):
                yield from (alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                yield node.module.partition(".")[0]
            waiting.extend(ast.iter_child_nodes(node))


def test_every_pin_is_of_one_version() -> None:
    for pin in PINS:
        (specifier,) = pin.specifier
        assert specifier.operator == "==" and "*" not in specifier.version, str(pin)


@pytest.mark.parametrize("python", PYTHONS)
def test_what_the_project_asks_for_is_pinned_within_its_range(python: str) -> None:
    pins = pinned(python)
    for requirement in map(Requirement, DECLARED):
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), str(requirement)


def test_what_those_packages_ask_for_in_turn_is_pinned() -> None:
    waiting = list(asked_for(DECLARED))
    seen: set[tuple[str, str]] = set()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        new = {(name, extra) for extra in ("", *requirement.extras)} - seen
        seen |= new
        waiting.extend(one for _, extra in new for one in asked_for(asked_by(name), extra))
    assert {name for name, _ in seen} <= set(pinned(f"{sys.version_info[0]}.{sys.version_info[1]}"))


def test_all_that_is_imported_is_declared_and_the_reverse() -> None:
    modules = {*imported(ROOT / "heapr"), *imported(ROOT / "hydra_plugins")}
    outside = modules - set(sys.stdlib_module_names) - {"heapr", "hydra_plugins"}
    distributions = packages_distributions()
    used = {canonicalize_name(name) for module in outside for name in distributions.get(module, [module])}
    extras = {*EXTRAS["dashboard"], *EXTRAS["gpu"]}
    required = {canonicalize_name(Requirement(text).name) for text in PROJECT["dependencies"]}
    optional = {canonicalize_name(Requirement(text).name) for text in extras}
    assert used <= required | optional
    assert required - used == {"accelerate"}  # transformers places weights with it
    assert optional <= used


def test_each_advisory_that_the_audit_leaves_out_is_explained() -> None:
    left_out = ADVISORY.findall((ROOT / "Makefile").read_text())
    (section,) = (ROOT / "docs" / "security.md").read_text().split("\n## Dependencies\n")[1:]
    rows = [line.split(" | ") for line in section.splitlines() if line.startswith("| ")][1:]
    explained = [number for row in rows for number in ADVISORY.findall(row[1])]
    assert sorted(left_out) == sorted(explained) and len(set(left_out)) == len(left_out) > 0


def test_explained_advisories_are_of_versions_that_are_pinned_still() -> None:
    section = (ROOT / "docs" / "security.md").read_text().split("\n## Dependencies\n")[1]
    rows = re.findall(r"^\| (\w+) (\d[\d.]*)(, Python 3\.10 only)?", section, re.MULTILINE)
    assert len(rows) > 0
    for name, version, old_only in rows:
        pythons = [
            python for python in PYTHONS if pinned(python)[canonicalize_name(name)] == Version(version)
        ]
        assert pythons == (["3.10"] if old_only else list(PYTHONS)), name
