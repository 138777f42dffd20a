"""Files of text into documents, one way for every corpus: plain text, JSON (an array or lines), parquet.

In: paths. Out: documents. UTF-8 with or without a byte order mark, line ends of any system, gzip or not; a
file's name tells its form. Complaints name file and line: JSON is never read as prose, and nothing is dropped
in silence.
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
ENDINGS = (*TEXT, *JSON, *PARQUET)  # of text and JSON, also with GZIP behind them
# How JSON begins and prose does not: a brace or bracket, then a quotation mark or the end of the line.
JSON_START = re.compile(r'\s*(\[?\s*\{\s*("|$)|\[\s*("|$))')


@dataclass(frozen=True)
class Source:
    """Files, and how their documents are found.

    Attributes:
        paths: read one after the other.
        field: of the text in a JSON object, or the column of parquet.
        row_of_line: makes a document of each line of plain text; None: a file of plain text is one document.
        num_documents: only the first so many; None takes all.
    """

    paths: tuple[Path, ...]
    field: str
    row_of_line: Callable[[str], str] | None = None
    num_documents: int | None = None

    def documents(self) -> Iterator[str]:
        """The documents in order, read lazily.

        Raises:
            ConfigError: a file cannot be read, does not hold what its name says, or holds no text.
        """
        return itertools.islice(self._all(), self.num_documents)

    def sha256(self) -> str:
        """Hash of the documents; the spelling of the files (line ends, marks, form) plays no part."""
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
    """The one of `ENDINGS` that says how a file is read.

    Raises:
        ConfigError: its name ends in none of them.
    """
    name = path.name.lower()
    is_compressed = name.endswith(GZIP)
    allowed = (*TEXT, *JSON) if is_compressed else ENDINGS
    for ending in allowed:
        if name.removesuffix(GZIP).endswith(ending):
            return ending
    forms = f"{', '.join(ENDINGS)}, which tell how it is read (text and JSON also with {GZIP})"
    raise ConfigError(f"'{path}' ends in none of {forms}; rename or convert it")


def is_readable(path: Path) -> bool:
    """Whether a file's name tells how it is read."""
    try:
        kind_of(path)
    except ConfigError:
        return False
    return True


@functools.lru_cache(maxsize=64)  # a job asks for it several times, a sweep hundreds of times
def _hash_documents(source: Source, sizes_and_times: tuple[tuple[int, int], ...]) -> str:
    """Hash of the documents of files that have these sizes and times of change."""
    digest = hashlib.sha256()
    for document in source.documents():
        encoded = document.encode()
        digest.update(f"{len(encoded)}\0".encode())
        digest.update(encoded)
    return digest.hexdigest()


def _lines_of_prose(path: Path) -> Iterator[str]:
    """Lines of plain text.

    Raises:
        ConfigError: it begins as JSON does.
    """
    has_begun = False
    for number, line in enumerate(lines(path), start=1):
        if not has_begun and JSON_START.match(line):
            hint = f"let it end in one of {', '.join(JSON)}"
            raise ConfigError(f"line {number} of '{path}' begins JSON, but the name says plain text; {hint}")
        has_begun = has_begun or bool(line.strip())
        yield line
