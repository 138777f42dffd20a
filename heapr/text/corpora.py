"""Corpora: ordered documents of real text.

In: where the text is. Out: documents, and an identity, which enters the key of every artifact made from the
text. The corpora of the paper are in published_corpora.py.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Protocol, runtime_checkable

from annotated_types import Ge

from heapr.errors import ConfigError, NotHereError
from heapr.files import user_path
from heapr.inputs import check_text_file
from heapr.limits import check_name
from heapr.text.docstrings import docstrings, source_hash
from heapr.text.reader import ENDINGS, Source, is_readable, kind_of
from heapr.text.splits import check_split, select_split

logger = logging.getLogger(__name__)


@runtime_checkable
class Corpus(Protocol):
    """A named, ordered source of documents."""

    name: str
    split: str

    def documents(self) -> Iterable[str]:
        """The documents of the split in a fixed order. Every call starts anew; reading may be lazy.

        Docstrings and your own files give no blank and no repeated documents. Published corpora keep every
        row, because published figures were measured that way (published_corpora.py).
        """
        ...

    def identity(self) -> dict[str, str]:
        """What the text is: equal identities mean equal documents. Cheap to compute; not a path or a name."""
        ...


class _Docstrings:
    """Docstrings of the Python files in a folder (no tests), in file and source order.

    Args:
        text: name of the text.
        root: the folder.
        split: one of `heapr.text.splits.PARTS`.
    """

    def __init__(self, text: str, root: Path, split: str) -> None:
        self.split = check_split(split)
        # A half of the held-out documents has a name of its own, since its figures differ.
        is_half = split in {"validation", "test"}
        self.name = f"{text}_{split}" if is_half else text
        self._text, self._root = text, root

    def documents(self) -> list[str]:
        return list(select_split(docstrings(self._root), self.split))

    def identity(self) -> dict[str, str]:
        return {"corpus": self._text, "split": self.split, "sha256": source_hash(self._root)}


class PyDocs(_Docstrings):
    """Docstrings of the running Python's standard library (no tests, no site-packages).

    Args:
        split: train, heldout (one document in ten, by hash), its halves validation and test, or all.
    """

    def __init__(self, split: str) -> None:
        super().__init__("pydocs", Path(sysconfig.get_path("stdlib")), split)


class PackageDocs(_Docstrings):
    """Docstrings of an installed Python package (no tests).

    Args:
        package: import name of the package, for example "numpy".
        split: as for `PyDocs`.

    Raises:
        NotHereError: the package is not installed.
        ConfigError: that is no package's name.
    """

    def __init__(self, package: str, split: str) -> None:
        if not package.isidentifier():  # to find a package in another one imports the other one
            raise ConfigError(
                f"corpus of package '{package}': that is not the name of a package; give one without dots,"
                " such as numpy"
            )
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            problem = "no such package is installed; install it or name another"
            raise NotHereError(f"corpus of package '{package}': {problem}")
        super().__init__(f"{package}docs", Path(spec.submodule_search_locations[0]), split)


class TextFiles:
    """Your own text or chats: plain text (one document per file), JSON (per object) or parquet (per row).

    Args:
        paths: files and folders, in the order in which their documents are joined; ~ is the home folder. Of a
            folder, all files in it and in its subfolders whose names say how to read them, in sorted order.
        split: as for `PyDocs`.
        text_field: field of the JSON objects, or column of the parquet file, that holds the text. Where it is
            missing, one of `heapr.text.chat.CHAT_FIELDS` holds a chat.
        name: name of the corpus in metrics.
        num_documents: use, and read, only the first documents, before they are split; None uses all.

    Raises:
        NotHereError: a file is missing.
        ConfigError: no path is given, a folder has no file to read, a file is empty, or its name does not say
            how to read it.
    """

    def __init__(
        self,
        paths: Sequence[str],
        split: str,
        text_field: str = "text",
        name: str = "text_files",
        num_documents: Annotated[int, Ge(1)] | None = None,
    ) -> None:
        if not paths:
            example = "calibration.corpus.paths=[my.txt]"
            raise ConfigError(f"text_files has no paths; give them, for example {example}")
        self.name, self.split = check_name("text_files.name", name), check_split(split)
        files: list[Path] = []
        for path in map(user_path, paths):
            files += _files_in(path) if path.is_dir() else [path]
        for file in files:
            _check_file(file)
        self._source = Source(tuple(files), text_field, num_documents=num_documents)

    def documents(self) -> Iterator[str]:
        """The documents, read lazily.

        Raises:
            ConfigError: the content of a file does not match its name; the message gives the line.
        """
        return select_split(self._source.documents(), self.split)

    def identity(self) -> dict[str, str]:
        return {"corpus": "text_files", "split": self.split, "sha256": self._source.sha256()}


def _files_in(folder: Path) -> list[Path]:
    """The files below a folder that can be read; hidden ones and those in hidden folders are left out.

    Raises:
        ConfigError: there are none, or a folder or file cannot be looked at.
    """
    visible = _visible_files(folder)
    readable = [path for path in visible if is_readable(path)]
    if not readable:
        raise ConfigError(f"folder '{folder}' has no file of text; give one with {', '.join(ENDINGS)} files")
    others = [path.name for path in visible if path not in readable]
    if others:
        left_out = f"{len(others)} left out for their names, such as {others[0]}"
        logger.info("%-9s folder '%s': %d files read, %s", "corpus", folder, len(readable), left_out)
    return readable


def _visible_files(folder: Path) -> list[Path]:
    """The files below a folder in sorted order, without hidden ones and those in hidden folders.

    Raises:
        ConfigError: a folder or file cannot be looked at, so that text would be left out in silence.
    """

    def refuse(error: OSError) -> None:
        raise error

    found: list[Path] = []
    try:
        for root, folders, names in os.walk(folder, onerror=refuse):
            folders[:] = [name for name in folders if not name.startswith(".")]
            paths = [Path(root) / name for name in names if not name.startswith(".")]
            found += [path for path in paths if path.is_file()]
    except OSError as error:
        raise ConfigError(
            f"folder '{folder}' cannot be searched for text: '{error.filename}': {error.strerror}; give the"
            " files themselves, or a folder that can be read as a whole"
        ) from error
    return sorted(found)


def _check_file(path: Path) -> None:
    check_text_file(path)
    kind_of(path)
