"""The corpora of the paper: WikiText-2-raw, Penn Treebank, C4.

In: a split of a data set on the Hugging Face hub, or a local copy of it. Out: its rows as they come, empty and repeated
ones too, as the published protocols join them (docs/method.md). The hub's commit, or the hash of the local file, is the identity.
"""

from __future__ import annotations

import gzip
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar

from huggingface_hub.errors import HfHubHTTPError

from heapr.calibration.corpora import parse_json_line
from heapr.errors import ConfigError, NotHereError
from heapr.files import hash_file
from heapr.hub import data_file

TEXT, JSON_LINES, PARQUET = (".txt", ".raw"), (".jsonl", ".json", ".jsonl.gz", ".json.gz"), (".parquet",)
FORMATS = (*TEXT, *JSON_LINES, *PARQUET)
COMMIT_LENGTH = 40  # hexadecimal digits


class PublishedText:
    """One split of a published data set. A subclass says which.

    Args:
        split: of the data set.
        path: a local copy instead: a file of text (`.txt`, `.raw`), JSON lines (`.jsonl`, `.json`, also with `.gz`) or
            `.parquet`, or a folder that holds the data set or one such file with the split in its name.
        num_documents: only the first of its rows, at least 1; none takes all.

    Raises:
        ConfigError: unknown split; a path with nothing usable; too small a number.
    """

    name: ClassVar[str]
    repository: ClassVar[str]
    revision: ClassVar[str]  # a commit, or a reference where the commit may move; the commit found is the identity
    files: ClassVar[Mapping[str, str]]  # by split
    column: ClassVar[str]

    def __init__(self, split: str, path: str | None = None, num_documents: int | None = None) -> None:
        if split not in self.files:
            raise ConfigError(f"{self.name} has no split '{split}'; choose one of {', '.join(self.files)}")
        if num_documents is not None and num_documents < 1:
            raise ConfigError(f"num_documents={num_documents} of {self.name} is below 1; give a whole number of at least 1")
        self.split, self.num_documents = split, num_documents
        self._local = None if path is None else self._find_local(Path(path).expanduser())

    def documents(self) -> list[str]:
        """The rows as they come: nothing is dropped.

        Raises:
            ConfigError: the data set is neither here nor can it be downloaded; or a row or the whole has no text.
        """
        file = self._local or self._hub_file()
        try:
            rows = list(itertools.islice(self._rows(file), self.num_documents))
        except ConfigError:
            raise
        except (OSError, EOFError, ValueError) as error:  # EOFError: gzip cut short; ValueError: not UTF-8, not parquet
            raise ConfigError(f"'{file}' of corpus '{self.name}' cannot be read: {str(error).splitlines()[0]}; get it again") from error
        if not any(row.strip() for row in rows):
            raise ConfigError(f"'{file}' of corpus '{self.name}' holds no text; give another file with its path")
        return rows

    def identity(self) -> dict[str, str]:
        rows = "all" if self.num_documents is None else str(self.num_documents)
        what = {"corpus": self.name, "split": self.split, "column": self.column, "num_documents": rows}
        if self._local is not None:
            return what | {"sha256": hash_file(self._local), "format": _format(self._local)}
        return what | {"hub": self.repository, "commit": self._commit(), "file": self.files[self.split]}

    def fetch(self) -> None:
        """Download what is not here yet.

        Raises:
            ConfigError: it cannot be downloaded.
        """
        if self._local is None:
            self._hub_file()

    @staticmethod
    def row_of_line(line: str) -> str:
        """The data set's row of one line of the original text file."""
        return line.rstrip("\n")

    def _commit(self) -> str:
        """Where the revision is a commit, nothing is read or asked."""
        if len(self.revision) == COMMIT_LENGTH:
            return self.revision
        parts = self._hub_file().parts
        return parts[parts.index("snapshots") + 1]

    def _hub_file(self) -> Path:
        name = self.files[self.split]
        what = f"corpus '{self.name}': '{name}' of data set {self.repository}"
        try:
            found = data_file(self.repository, self.revision, name)
        except (HfHubHTTPError, OSError) as error:
            raise ConfigError(
                f"{what} cannot be downloaded: {str(error).strip().splitlines()[0]}; give a local copy with its path"
            ) from error
        if found is None:
            raise NotHereError(
                f"{what} is not in the local hub cache, and the hub cannot be reached; run python -m heapr.prefetch with the "
                "same overrides where there is a network, or give a local copy with its path"
            )
        return found

    def _find_local(self, path: Path) -> Path:
        if path.is_file():
            _format(path)
            return path
        if not path.is_dir():
            raise ConfigError(f"corpus '{self.name}': path '{path}' does not exist; give a file ({', '.join(FORMATS)}) or a folder")
        if (path / self.files[self.split]).is_file():
            return path / self.files[self.split]
        found = sorted(file for file in path.iterdir() if self.split in file.name and file.name.endswith(FORMATS))
        if len(found) != 1:
            names = ", ".join(file.name for file in found) or "none"
            wanted = f"one file with '{self.split}' in its name ({', '.join(FORMATS)})"
            raise ConfigError(f"corpus '{self.name}': folder '{path}' should hold {wanted}, but has {names}; give the file itself")
        return found[0]

    def _rows(self, file: Path) -> Iterator[str]:
        kind = _format(file)
        if kind in PARQUET:
            yield from self._parquet_rows(file)
            return
        opened = gzip.open if kind.endswith(".gz") else open
        with opened(file, "rt", encoding="utf-8", newline="\n") as lines:
            for number, line in enumerate(lines, start=1):
                if kind in TEXT:
                    yield self.row_of_line(line)
                elif line.strip():
                    yield parse_json_line(line, self.column, f"line {number} of '{file}'")

    def _parquet_rows(self, file: Path) -> Iterator[str]:
        from pyarrow.parquet import ParquetFile  # a fraction of a second to import

        table = ParquetFile(file)
        if self.column not in table.schema_arrow.names:
            columns = ", ".join(table.schema_arrow.names)
            raise ConfigError(f"'{file}' has no column '{self.column}' but {columns}; corpus '{self.name}' needs it")
        for batch in table.iter_batches(columns=[self.column]):
            yield from batch.column(0).cast("string").fill_null("").to_pylist()


class WikiText2(PublishedText):
    """WikiText-2-raw: one row per line, with its line end; lines of white space are empty rows."""

    name = "wikitext2"
    repository = "Salesforce/wikitext"
    revision = "b08601e04326c79dfdd32d625aee71d232d685c3"
    files: ClassVar = {split: f"wikitext-2-raw-v1/{split}-00000-of-00001.parquet" for split in ("train", "validation", "test")}
    column = "text"

    @staticmethod
    def row_of_line(line: str) -> str:
        return line if line.strip() else ""


class PennTreebank(PublishedText):
    """Penn Treebank as prepared for language modelling: one row per sentence, without white space around it."""

    name = "ptb"
    repository = "ptb-text-only/ptb_text_only"
    revision = "refs/convert/parquet"
    files: ClassVar = {split: f"penn_treebank/{split}/0000.parquet" for split in ("train", "validation", "test")}
    column = "sentence"

    @staticmethod
    def row_of_line(line: str) -> str:
        return line.strip()


class C4(PublishedText):
    """English C4, the first shard of each split: one row per document. Of a text file, every line is one document."""

    name = "c4"
    repository = "allenai/c4"
    revision = "1588ec454efa1a09f29cd18ddd04fe05fc8653a2"
    files: ClassVar = {"train": "en/c4-train.00000-of-01024.json.gz", "validation": "en/c4-validation.00000-of-00008.json.gz"}
    column = "text"


def _format(path: Path) -> str:
    """Which of the known endings a file's name has."""
    for ending in sorted(FORMATS, key=len, reverse=True):
        if path.name.endswith(ending):
            return ending
    raise ConfigError(f"'{path}' ends in none of {', '.join(FORMATS)}; convert it, or give another file")
