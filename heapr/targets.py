"""Which classes the `_target_`s of a configuration may name, decided before anything is imported or called.

They are the public classes of heapr's own packages of plug-ins, and those of packages that the user allows on
the command line. In: a configuration. Out: nothing, or a refusal. So a configuration file from elsewhere
cannot run code.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heapr.errors import ConfigError

ROOT = Path(__file__).parent
TARGET = "_target_"
NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")  # of a class, with its module


@dataclass(frozen=True)
class Kind:
    """A kind of plug-in.

    Attributes:
        name: for messages.
        package: where heapr's own are.
        methods: that their classes have.
    """

    name: str
    package: str
    methods: tuple[str, ...]


CRITERION = Kind("criterion", "heapr.score", ("__call__",))
REPAIR = Kind("way to repair", "heapr.pruning", ("__call__",))
CORPUS = Kind("corpus", "heapr.text", ("identity",))
MEASUREMENT = Kind("measurement", "heapr.evaluation", ("identity", "prepare", "__call__"))
KINDS = (CRITERION, REPAIR, CORPUS, MEASUREMENT)
PLACES = (  # the first that fits the place of an entry
    (re.compile(r"score"), CRITERION),
    (re.compile(r"pruning\.repair"), REPAIR),
    (re.compile(r"calibration\.corpus(\.parts\.[^.]+\.corpus)?"), CORPUS),
    (re.compile(r"evaluation\.corpora\.[^.]+"), CORPUS),
    (re.compile(r"evaluation\.[^.]+"), MEASUREMENT),
)


def kind_at(where: str) -> Kind | None:
    """The kind of plug-in that belongs to a place of the configuration; None if it is up to a plug-in."""
    for place, kind in PLACES:
        if place.fullmatch(where):
            return kind
    return None


def check_targets(config: Mapping[str, Any], allow: Sequence[str] = ()) -> None:
    """Check every `_target_` of a configuration, however deep it is.

    Args:
        config: in JSON types.
        allow: packages that the user allows.

    Raises:
        ConfigError: one of them names nothing that may be built; the message names the place.
    """
    for package in allow:
        if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", package):
            raise ConfigError(
                f"plugins.allow: '{package}' is not the name of a package; give names such as my_package"
            )
    for where, target in _targets(config, ""):
        _check_target(where, target, allow)


def _check_target(where: str, target: Any, allow: Sequence[str]) -> None:
    """Check one `_target_`.

    Raises:
        ConfigError: see `check_targets`.
    """
    name = f"{where}.{TARGET}='{target}'" if where else f"{TARGET}='{target}'"
    if not isinstance(target, str) or not NAME.fullmatch(target):
        raise ConfigError(f"{name} is not the name of a class with its module; see docs/adding.md")
    if any(target.startswith(f"{package}.") for package in allow):
        return
    kind = kind_at(where)
    kinds = KINDS if kind is None else (kind,)
    if any(_is_own(target, one) for one in kinds):
        return
    packages = " or ".join(one.package for one in kinds)
    what = "plug-in" if kind is None else kind.name
    advice = ""
    package = target.partition(".")[0]
    if package != "heapr":
        advice = f"; if you trust package {package}, give plugins.allow=[{package}] on the command line"
    raise ConfigError(f"{name} is not a {what} of {packages}{advice}; see docs/adding.md")


def _is_own(target: str, kind: Kind) -> bool:
    """Whether a name is that of a public class which is defined in heapr's package for a kind of plug-in."""
    module, _, class_name = target.rpartition(".")
    if not module.startswith(f"{kind.package}.") or class_name.startswith("_"):
        return False
    return class_name in _classes_of(module)


@functools.cache
def _classes_of(module: str) -> frozenset[str]:
    """Names of the classes that a module of heapr defines, read without importing it."""
    file = ROOT.joinpath(*module.split(".")[1:]).with_suffix(".py")
    if not file.is_file():
        return frozenset()
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return frozenset(node.name for node in tree.body if isinstance(node, ast.ClassDef))


def _targets(value: Any, where: str) -> Iterator[tuple[str, Any]]:
    """Every `_target_` below a value, with the place of its entry."""
    if isinstance(value, Mapping):
        if TARGET in value:
            yield where, value[TARGET]
        for key, item in value.items():
            yield from _targets(item, f"{where}.{key}" if where else str(key))
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from _targets(item, f"{where}.{number}")
