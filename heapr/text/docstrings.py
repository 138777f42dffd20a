"""Collects the docstrings of the Python files in a folder, without tests.

In: a folder. Out: its docstrings, and a hash of the files that they come from.
"""

from __future__ import annotations

import ast
import functools
import gc
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SKIPPED_FOLDERS = ("site-packages", "__pycache__")
OWNERS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
BLOCKS = ("body", "handlers", "orelse", "finalbody", "cases")  # fields of statements that hold statements


def docstrings(root: Path) -> list[str]:
    """Every docstring below `root`: files in sorted order, docstrings in source order."""
    return _docstrings(root, source_hash(root))


@functools.cache  # a job needs it eight times, and installed packages do not change while a process runs
def source_hash(root: Path) -> str:
    """Hash of the source files. It takes tenths of a second; parsing the files takes several seconds."""
    digest = hashlib.sha256()
    for path in _source_files(root):
        name = path.relative_to(root).as_posix()
        digest.update(f"{name}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


@functools.lru_cache(maxsize=2)  # parsing takes seconds, and a run needs several splits
def _docstrings(root: Path, content_hash: str) -> list[str]:
    """Docstrings below `root`; the hash is part of the cache's key."""
    found: list[str] = []
    with _no_search_for_garbage():
        for path in _source_files(root):
            found.extend(_docstrings_of(path))
    return found


@contextmanager
def _no_search_for_garbage() -> Iterator[None]:
    """Syntax trees are many objects without cycles: Python would search all that torch and transformers have
    made, again and again, and find nothing, which takes two thirds of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _docstrings_of(path: Path) -> Iterator[str]:
    """Docstrings of one file; nothing if it is not valid Python, such as a template."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return
    owners = [node for node in _statements(tree) if isinstance(node, OWNERS)]
    owners.sort(key=lambda node: getattr(node, "lineno", 0))
    for node in owners:
        text = ast.get_docstring(node)
        if text:
            yield text


def _statements(tree: ast.Module) -> list[ast.AST]:
    """A module and all of its statements. Expressions, most of a tree, own no docstrings."""
    found: list[ast.AST] = [tree]
    for node in found:  # which grows meanwhile
        for name in BLOCKS:
            found += getattr(node, name, [])
    return found


def _source_files(root: Path) -> list[Path]:
    """Python files below `root` in a fixed order, without tests, site-packages and caches."""
    found: list[Path] = []
    for folder, subfolders, names in os.walk(root):
        # In place, so that os.walk does not enter the others.
        subfolders[:] = [name for name in subfolders if not _is_skipped(name)]
        found += [Path(folder, name) for name in names if _is_source(name)]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _is_source(file: str) -> bool:
    return file.endswith(".py") and not file.startswith("test_")


def _is_skipped(folder: str) -> bool:
    return folder in SKIPPED_FOLDERS or folder.startswith("test") or folder.endswith("_test")
