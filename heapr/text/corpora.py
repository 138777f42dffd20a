"""Corpora: ordered documents of real text, each with an identity that enters the artifact key.

In: where the text lives. Out: documents. Splits are made by document hash, so the text that is calibrated on never
appears in the text that is evaluated on, nor the text that options are chosen on (validation) in the text that is reported on
(test). The paper's corpora: published.py.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import os
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from heapr.errors import ConfigError, NotHereError
from heapr.files import user_path
from heapr.text.reader import Source, kind_of

PARTS = {  # what each split is made of, none of them in two parts
    "train": {"train"},
    "heldout": {"validation", "test"},
    "validation": {"validation"},
    "test": {"test"},
    "all": {"train", "validation", "test"},
}
HELDOUT_BUCKETS = 10  # one document in ten is held out, and of those every other one is for testing


@runtime_checkable
class Corpus(Protocol):
    """A named, ordered source of documents."""

    name: str
    split: str

    def documents(self) -> Iterable[str]:
        """The documents of the split, in a fixed order; may be read as they are asked for, from the start each time.

        Text that is collected here (docstrings, your own files) comes without blank and repeated documents; published corpora come
        row by row as they were published (published.py), because published figures were measured so.
        """
        ...

    def identity(self) -> dict[str, str]:
        """What the text is, cheap to compute: equal identities mean equal documents. Never a path or a name alone."""
        ...


class PyDocs:
    """Docstrings of the running Python's standard library (no tests, no site-packages), in file and source order.

    Args:
        split: one of `PARTS`: "heldout" is one document in ten, by hash, "validation" and "test" are its halves.
    """

    def __init__(self, split: str) -> None:
        self.split = _check_split(split)
        self.name = _name_of_part("pydocs", split)
        self._root = Path(sysconfig.get_path("stdlib"))

    def documents(self) -> list[str]:
        return list(select_split(_docstrings(self._root, _content_hash(self._root)), self.split))

    def identity(self) -> dict[str, str]:
        return {"corpus": "pydocs", "split": self.split, "sha256": _content_hash(self._root)}


class PackageDocs:
    """Docstrings of an installed Python package (no tests), in file and source order.

    Args:
        package: import name of the package, for example "numpy".
        split: one of `PARTS`, as for `PyDocs`.

    Raises:
        NotHereError: the package is not installed.
    """

    def __init__(self, package: str, split: str) -> None:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise NotHereError(f"corpus of package '{package}': no such package is installed; install it or name another")
        self.split = _check_split(split)
        self._text = f"{package}docs"
        self.name = _name_of_part(self._text, split)
        self._root = Path(spec.submodule_search_locations[0])

    def documents(self) -> list[str]:
        return list(select_split(_docstrings(self._root, _content_hash(self._root)), self.split))

    def identity(self) -> dict[str, str]:
        return {"corpus": self._text, "split": self.split, "sha256": _content_hash(self._root)}


class TextFiles:
    """A user's own text: files of plain text (one document each), JSON or parquet (one document an object or row), also with .gz.

    Args:
        paths: the files, in the order in which their documents are joined; ~ is the home folder.
        split: one of `PARTS`, as for `PyDocs`.
        text_field: name of the text in each JSON object, or of the column of parquet.
        name: what the corpus is called in metrics.

    Raises:
        NotHereError: a file is missing.
        ConfigError: no path given, a file is empty, or its name does not tell how it is read.
    """

    def __init__(self, paths: Sequence[str], split: str, text_field: str = "text", name: str = "text_files") -> None:
        self.name = name
        if not paths:
            raise ConfigError("text_files has no paths; give them, for example calibration.corpus.paths=[my.txt]")
        self.split = _check_split(split)
        self._source = Source(tuple(user_path(path) for path in paths), text_field)
        for path in self._source.paths:
            if not path.is_file():
                raise NotHereError(f"text file '{path}' does not exist or is not a file; give the path of a readable file")
            if path.stat().st_size == 0:
                raise ConfigError(f"text file '{path}' is empty; give a file with text")
            kind_of(path)

    def documents(self) -> Iterator[str]:
        """Read as they are asked for.

        Raises:
            ConfigError: a file is not of the form that its name says; the message names the line.
        """
        return select_split(self._source.documents(), self.split)

    def identity(self) -> dict[str, str]:
        return {"corpus": "text_files", "split": self.split, "sha256": self._source.sha256()}


def select_split(documents: Iterable[str], split: str) -> Iterator[str]:
    """The documents of one split, blank and repeated ones dropped, order kept. Holds their hashes, not the documents."""
    seen: set[bytes] = set()
    for document in documents:
        if not document.strip():
            continue
        digest = hashlib.sha256(document.encode()).digest()
        if digest not in seen:
            seen.add(digest)
            if _part_of_digest(digest) in PARTS[split]:
                yield document


def part_of(document: str) -> str:
    """ "train", "validation" or "test": decided by a document's own hash alone, so it can never be in two."""
    return _part_of_digest(hashlib.sha256(document.encode()).digest())


def _part_of_digest(digest: bytes) -> str:
    if int.from_bytes(digest[:8], "big") % HELDOUT_BUCKETS != 0:
        return "train"
    return "validation" if digest[8] % 2 == 0 else "test"


def share_text(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether two corpora, told by their identities, may have documents in common.

    Splits of one text are apart if they have no part in common. A published data set's splits are files of their own: what is
    one file is one text, whatever split it is given as.
    """
    texts = [{name: value for name, value in identity.items() if name != "split"} for identity in (first, second)]
    is_published = "column" in first
    parts = [PARTS.get(identity["split"], PARTS["all"]) for identity in (first, second)]
    return texts[0] == texts[1] and (is_published or bool(parts[0] & parts[1]))


def _check_split(split: str) -> str:
    if split not in PARTS:
        raise ConfigError(f"corpus split '{split}' is unknown; choose one of {', '.join(PARTS)}")
    return split


def _name_of_part(text: str, split: str) -> str:
    """Half of the held-out documents is called so, because figures on it are others than on all of them."""
    return f"{text}_{split}" if split in {"validation", "test"} else text


def _source_files(root: Path) -> list[Path]:
    """Python files below root in a fixed order, without tests, site-packages and caches."""
    found: list[Path] = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not _is_skipped_folder(name)]
        found.extend(Path(folder, name) for name in names if name.endswith(".py") and not name.startswith("test_"))
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _is_skipped_folder(name: str) -> bool:
    return name in ("site-packages", "__pycache__") or name.startswith("test") or name.endswith("_test")


@functools.cache  # a job asks for it eight times, a sweep of 500 jobs for minutes; what is installed stays as it is while a process runs
def _content_hash(root: Path) -> str:
    """Hash of the source files: tenths of a second, where parsing them for their docstrings takes several."""
    digest = hashlib.sha256()
    for path in _source_files(root):
        digest.update(f"{path.relative_to(root).as_posix()}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


@functools.lru_cache(maxsize=2)  # parsing takes seconds, and a run needs several splits
def _docstrings(root: Path, content_hash: str) -> list[str]:
    """Every docstring below root, files in sorted order, docstrings in source order."""
    documents: list[str] = []
    for path in _source_files(root):
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue  # files made to be invalid, such as templates: they hold no docstrings
        owners = [n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)]
        owners.sort(key=lambda node: getattr(node, "lineno", 0))
        documents.extend(text for node in owners if (text := ast.get_docstring(node)))
    return documents
