"""The corpora of the paper: WikiText-2-raw, Penn Treebank, C4.

In: a split of a data set on the Hugging Face hub, or a local copy of it. Out: all its rows, also empty and
repeated ones, because the published protocols join all of them (docs/method.md). The identity is the hub's
commit, or the hash of a local file's rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, ClassVar

from annotated_types import Ge
from huggingface_hub.errors import HfHubHTTPError

from heapr.errors import ConfigError, NotHereError
from heapr.files import user_path
from heapr.hub import data_file
from heapr.text.reader import ENDINGS, Source, is_readable, kind_of
from heapr.words import first_line

COMMIT_LENGTH = 40  # hexadecimal digits
SPLITS = ("train", "validation", "test")  # of WikiText-2 and Penn Treebank


class PublishedText:
    """One split of a published data set; a subclass names the data set.

    Args:
        split: of the data set.
        path: a local copy to use instead: a file in any format that `heapr.text.reader` reads (plain text
            with one row per line), or a folder with the data set's files or one file named after the split.
        num_documents: use only the first rows, at least 1; None uses all.

    Raises:
        ConfigError: the split is unknown, or the path holds no usable file.
    """

    name: ClassVar[str]
    repository: ClassVar[str]
    revision: ClassVar[str]  # a commit, or a reference that may move; the identity contains the commit
    files: ClassVar[Mapping[str, str]]  # by split
    column: ClassVar[str]

    def __init__(
        self, split: str, path: str | None = None, num_documents: Annotated[int, Ge(1)] | None = None
    ) -> None:
        if split not in self.files:
            raise ConfigError(f"{self.name} has no split '{split}'; choose one of {', '.join(self.files)}")
        self.split, self.num_documents = split, num_documents
        self._local = None if path is None else self._find_local(user_path(path))

    def documents(self) -> Iterator[str]:
        """All rows, read lazily.

        Raises:
            ConfigError: the data set is not here and cannot be downloaded, a row has no text field, or no row
                has text.
        """
        file = self._local or self._hub_file()
        return self._source(file).documents()

    def identity(self) -> dict[str, str]:
        rows = "all" if self.num_documents is None else str(self.num_documents)
        identity = {"corpus": self.name, "split": self.split, "column": self.column, "num_documents": rows}
        if self._local is not None:
            return identity | {"sha256": self._source(self._local).sha256()}
        return identity | {"hub": self.repository, "commit": self._commit(), "file": self.files[self.split]}

    def fetch(self) -> None:
        """Download the file unless it is here.

        Raises:
            ConfigError: it cannot be downloaded.
        """
        if self._local is None:
            self._hub_file()

    @staticmethod
    def row_of_line(line: str) -> str:
        """The data set's row for one line of the original text file."""
        return line.rstrip("\n")

    def _commit(self) -> str:
        """The hub's commit; found without network and disk if the revision is a commit itself."""
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
            problem = f"{what} cannot be downloaded: {first_line(error)}"
            raise ConfigError(f"{problem}; give a local copy with its path") from error
        if found is None:
            raise NotHereError(
                f"{what} is not in the local hub cache, and the hub cannot be reached; "
                "run python -m heapr.prefetch with the same overrides where there is a network, "
                "or give a local copy with its path"
            )
        return found

    def _find_local(self, path: Path) -> Path:
        if path.is_file():
            kind_of(path)
            return path
        what, forms = f"corpus '{self.name}'", ", ".join(ENDINGS)
        if not path.is_dir():
            raise ConfigError(f"{what}: path '{path}' does not exist; give a file ({forms}) or a folder")
        original = path / self.files[self.split]
        if original.is_file():
            return original
        # A pipe would be waited for.
        files = [file for file in sorted(path.iterdir()) if file.is_file()]
        found = [file for file in files if self.split in file.name and is_readable(file)]
        if len(found) != 1:
            names = [file.name for file in found]
            wanted = f"one file with '{self.split}' in its name ({forms})"
            has = ", ".join(names) or "none"
            problem = f"{what}: folder '{path}' should hold {wanted}, but has {has}"
            raise ConfigError(f"{problem}; give the file itself")
        return found[0]

    def _source(self, file: Path) -> Source:
        return Source((file,), self.column, self.row_of_line, self.num_documents)


class WikiText2(PublishedText):
    """WikiText-2-raw: one row per line, including its line end; a line of white space is an empty row."""

    name = "wikitext2"
    repository = "Salesforce/wikitext"
    revision = "b08601e04326c79dfdd32d625aee71d232d685c3"
    files: ClassVar = {split: f"wikitext-2-raw-v1/{split}-00000-of-00001.parquet" for split in SPLITS}
    column = "text"

    @staticmethod
    def row_of_line(line: str) -> str:
        return line if line.strip() else ""


class PennTreebank(PublishedText):
    """Penn Treebank as prepared for language models: one row per sentence, white space around it removed."""

    name = "ptb"
    repository = "ptb-text-only/ptb_text_only"
    revision = "refs/convert/parquet"
    files: ClassVar = {split: f"penn_treebank/{split}/0000.parquet" for split in SPLITS}
    column = "sentence"

    @staticmethod
    def row_of_line(line: str) -> str:
        return line.strip()


class C4(PublishedText):
    """English C4, the first shard of each split: one row per document, which is one line in plain text."""

    name = "c4"
    repository = "allenai/c4"
    revision = "1588ec454efa1a09f29cd18ddd04fe05fc8653a2"
    files: ClassVar = {
        "train": "en/c4-train.00000-of-01024.json.gz",
        "validation": "en/c4-validation.00000-of-00008.json.gz",
    }
    column = "text"
