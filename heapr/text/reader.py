"""Reads documents from plain text, JSON (an array or lines) and parquet, the same way for every corpus.

In: paths; the ending of a file's name says its format. Text is UTF-8 with or without a byte order mark, with
any system's line ends, compressed with gzip or not. Out: documents. Errors name file and line; JSON is never
read as plain text, and nothing is dropped silently.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from heapr.errors import ConfigError
from heapr.text.lines import GZIP, lines
from heapr.text.records import json_records, parquet_rows

TEXT, JSON, PARQUET = (".txt", ".text", ".raw", ".md"), (".jsonl", ".ndjson", ".json"), (".parquet",)
ENDINGS = (*TEXT, *JSON, *PARQUET)  # GZIP may follow those of text and JSON
# JSON begins with a brace or bracket, then a quotation mark or the end of the line; prose does not.
JSON_START = re.compile(r'\s*(\[?\s*\{\s*("|$)|\[\s*("|$))')


@dataclass(frozen=True)
class Source:
    """Files, and how to find documents in them.

    Attributes:
        paths: the files, read in this order.
        field: field of the JSON objects, or column of the parquet file, that holds the text.
        row_of_line: makes a document of each line of plain text; None makes one document of the whole file.
        num_documents: use only the first documents; None uses all.
    """

    paths: tuple[Path, ...]
    field: str
    row_of_line: Callable[[str], str] | None = None
    num_documents: int | None = None

    def documents(self) -> Iterator[str]:
        """The documents in order, read lazily.

        Raises:
            ConfigError: a file cannot be read, has another format than its name says, or has no text.
        """
        return itertools.islice(self._all(), self.num_documents)

    def sha256(self) -> str:
        """Hash of the documents. It does not depend on line ends, byte order marks or the file's format."""
        states = [path.stat() for path in self.paths]
        sizes_and_times = [(state.st_size, state.st_mtime_ns) for state in states]
        return _hash_documents(self, tuple(sizes_and_times))

    def _all(self) -> Iterator[str]:
        for path in self.paths:
            has_text = False
            for document in self._documents_of(path):
                has_text = has_text or bool(document.strip())
                yield document
            if not has_text:
                raise ConfigError(f"'{path}' holds no text; give a file with text")

    def _documents_of(self, path: Path) -> Iterator[str]:
        kind = kind_of(path)
        if kind in PARQUET:
            return parquet_rows(path, self.field)
        if kind in JSON:
            return json_records(path, self.field)
        prose = _lines_of_prose(path)
        if self.row_of_line is not None:
            return map(self.row_of_line, prose)
        return iter(["".join(prose)])


def kind_of(path: Path) -> str:
    """Find the one of `ENDINGS` that a file's name has, which says how to read it.

    Raises:
        ConfigError: it has none of them.
    """
    name = path.name.lower()
    is_compressed = name.endswith(GZIP)
    allowed = (*TEXT, *JSON) if is_compressed else ENDINGS
    for ending in allowed:
        if name.removesuffix(GZIP).endswith(ending):
            return ending
    forms = f"{', '.join(ENDINGS)}, which tell how it is read (text and JSON also with {GZIP})"
    raise ConfigError(f"'{path}' has none of the endings {forms}; rename or convert it")


def is_readable(path: Path) -> bool:
    """Whether a file's name says how to read it."""
    try:
        kind_of(path)
    except ConfigError:
        return False
    return True


@functools.lru_cache(maxsize=64)  # a job asks for it several times, a sweep hundreds of times
def _hash_documents(source: Source, sizes_and_times: tuple[tuple[int, int], ...]) -> str:
    """Hash of the documents; sizes and times of the files are part of the cache's key."""
    digest = hashlib.sha256()
    for document in source.documents():
        encoded = document.encode()
        digest.update(f"{len(encoded)}\0".encode())
        digest.update(encoded)
    return digest.hexdigest()


def _lines_of_prose(path: Path) -> Iterator[str]:
    """The lines of a file of plain text.

    Raises:
        ConfigError: it begins like JSON.
    """
    has_begun = False
    for number, line in enumerate(lines(path), start=1):
        if not has_begun and JSON_START.match(line):
            hint = f"let it end in one of {', '.join(JSON)}"
            raise ConfigError(
                f"line {number} of '{path}' begins like JSON, but the name says plain text; {hint}"
            )
        has_begun = has_begun or bool(line.strip())
        yield line
