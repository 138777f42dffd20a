"""Reads files of text, the same way for every corpus: plain text, JSON (an array, or one object a line), parquet.

In: paths. Out: documents. UTF-8 with or without a byte order mark, line ends of any system, gzip or not; a name tells the form.
Complaints name file and line, so that JSON is never read as prose and nothing is dropped in silence.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import itertools
import json
import re
import zlib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heapr.errors import ConfigError
from heapr.words import first_line

TEXT, JSON, PARQUET = (".txt", ".text", ".raw", ".md"), (".jsonl", ".ndjson", ".json"), (".parquet",)
GZIP = ".gz"  # behind an ending of text or JSON
ENDINGS = (*TEXT, *JSON, *PARQUET)
BYTE_ORDER_MARK = "\ufeff"
CHAT_FIELDS = ("messages", "conversations", "conversation")
# How JSON begins and prose does not: a brace or bracket, behind it a quotation mark or nothing.
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
        """The documents in order, read as they are asked for.

        Raises:
            ConfigError: a file cannot be read, is not of the form that its name says, or holds no text.
        """
        return itertools.islice(self._all(), self.num_documents)

    def sha256(self) -> str:
        """Hash of the documents: files that are spelt otherwise (line ends, byte order mark, form) but hold the same have the same."""
        states = [path.stat() for path in self.paths]
        return _hash_documents(self, tuple((state.st_size, state.st_mtime_ns) for state in states))

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
            return _parquet_rows(path, self.field)
        if kind in JSON:
            return _json_records(path, self.field)
        lines = _plain_lines(path)
        return map(self.row_of_line, lines) if self.row_of_line else iter(["".join(lines)])


def kind_of(path: Path) -> str:
    """The one of `ENDINGS` that says how a file is read.

    Raises:
        ConfigError: its name ends in none of them.
    """
    name = path.name.lower()
    is_compressed = name.endswith(GZIP)
    name = name.removesuffix(GZIP)
    for ending in ENDINGS:
        if name.endswith(ending) and not (is_compressed and ending in PARQUET):
            return ending
    raise ConfigError(
        f"'{path}' ends in none of {', '.join(ENDINGS)}, which tell how it is read (text and JSON also with {GZIP}); rename or convert it"
    )


def is_readable(path: Path) -> bool:
    """Whether a file's name tells how it is read."""
    try:
        return bool(kind_of(path))
    except ConfigError:
        return False


@functools.lru_cache(maxsize=64)  # a job asks for it several times, a sweep hundreds of times
def _hash_documents(source: Source, state: tuple[tuple[int, int], ...]) -> str:
    """Of files in one state: their sizes and times of change."""
    digest = hashlib.sha256()
    for document in source.documents():
        encoded = document.encode()
        digest.update(f"{len(encoded)}\0".encode())
        digest.update(encoded)
    return digest.hexdigest()


def _lines(path: Path) -> Iterator[str]:
    r"""Lines of a file with "\n" at their ends, whatever they have there in the file.

    Bytes that are not UTF-8 become surrogates, which UTF-8 cannot hold: so the line is known.
    """
    number = 0
    opened = gzip.open if path.name.lower().endswith(GZIP) else open
    with _complaints(path, lambda: f"after line {number}"), opened(path, "rt", encoding="utf-8", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, start=1):
            if not _is_utf8(line):
                raise ConfigError(f"line {number} of '{path}' is not UTF-8; convert the file, for example with iconv")
            if "\0" in line:
                raise ConfigError(f"line {number} of '{path}' holds a zero byte, which no text does; convert the file to UTF-8")
            yield line.removeprefix(BYTE_ORDER_MARK)  # on the first line, and where files were put together


def _plain_lines(path: Path) -> Iterator[str]:
    """Lines of prose."""
    has_begun = False
    for number, line in enumerate(_lines(path), start=1):
        if not has_begun and JSON_START.match(line):
            endings = ", ".join(JSON)
            raise ConfigError(f"line {number} of '{path}' begins JSON, but the name says plain text; let it end in one of {endings}")
        has_begun = has_begun or bool(line.strip())
        yield line


def _json_records(path: Path, field: str) -> Iterator[str]:
    """The text of every object: of an array's elements, or of every line that is not blank."""
    lines = enumerate(_lines(path), start=1)
    for number, line in lines:
        if line.lstrip().startswith("["):
            rest = (later for _, later in lines)
            yield from _array_records("".join(["\n" * (number - 1), line, *rest]), field, path)
        elif line.strip():
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:  # beside what is no JSON, numbers and depths beyond Python's limits
                raise _not_json(number, path, getattr(error, "msg", str(error))) from error
            if problem := _problem(value, field):
                raise ConfigError(f"line {number} of '{path}' {problem}")
            yield value[field]


def _array_records(text: str, field: str, path: Path) -> Iterator[str]:
    """The same of one array that may run over many lines; one element is decoded at a time."""
    decode = json.JSONDecoder().raw_decode
    line_of = lambda position: text.count("\n", 0, position) + 1  # noqa: E731  only for complaints
    position = _skip_blanks(text, text.index("[") + 1)
    while not text.startswith("]", position):
        try:
            value, end = decode(text, position)
        except (ValueError, RecursionError) as error:
            number = getattr(error, "lineno", None) or line_of(position)
            raise _not_json(number, path, getattr(error, "msg", str(error))) from error
        if problem := _problem(value, field):
            raise ConfigError(f"line {line_of(position)} of '{path}' {problem}")
        yield value[field]
        position = _skip_blanks(text, end)
        if text.startswith(",", position):
            position = _skip_blanks(text, position + 1)
        elif not text.startswith("]", position):
            raise _not_json(line_of(position), path, "an array goes on with ',' or ends with ']'")
    behind = _skip_blanks(text, position + 1)
    if behind < len(text):
        raise _not_json(line_of(behind), path, "something stands behind the array")


def _skip_blanks(text: str, position: int) -> int:
    """The next place that holds no white space."""
    while text[position : position + 1].isspace():
        position += 1
    return position


def _parquet_rows(path: Path, column: str) -> Iterator[str]:
    """A column of text; null is an empty row."""
    import pyarrow  # a fraction of a second to import
    from pyarrow.parquet import ParquetFile

    with _complaints(path, lambda: "as parquet"):
        table = ParquetFile(path)
        schema = table.schema_arrow
        if column not in schema.names:
            raise ConfigError(f"'{path}' {_no_such_field('column', column, schema.names)}")
        type_ = schema.field(column).type
        type_ = type_.value_type if pyarrow.types.is_dictionary(type_) else type_
        if not (pyarrow.types.is_string(type_) or pyarrow.types.is_large_string(type_) or pyarrow.types.is_string_view(type_)):
            raise ConfigError(f"column '{column}' of '{path}' holds {type_}, not text; rename the one with the text, or give another file")
        for batch in table.iter_batches(columns=[column]):
            yield from batch.column(0).cast("string").fill_null("").to_pylist()


def _problem(value: Any, field: str) -> str | None:
    """Why a JSON value has no text in a field, and what to do; None if it has."""
    if not isinstance(value, dict):
        return f"is not a JSON object with text in the field '{field}', but a {type(value).__name__}; mend it"
    if field not in value or (field in CHAT_FIELDS and isinstance(value[field], list)):
        return _no_such_field("field", field, value)
    text = value[field]
    if not isinstance(text, str):
        return f"is not a JSON object with text in the field '{field}', which holds {json.dumps(text):.40}; mend it"
    if not _is_utf8(text):
        return f"holds half a character in the field '{field}' (a lone surrogate, \\ud800 to \\udfff); mend it or leave it out"
    return None


def _no_such_field(what: str, field: str, known: Collection[str]) -> str:
    """Field or column: what to do without it."""
    chat = next((name for name in CHAT_FIELDS if name in known), None)
    if chat is not None:
        target = "text" if field == chat else field
        return (
            f"is chat data ({what} '{chat}'), which is not read as such, because its text depends on the model's chat template; write "
            f"every conversation as one text into the {what} '{target}', for example with "
            "tokenizer.apply_chat_template(messages, tokenize=False)"
        )
    names = ", ".join(known) or "nothing"
    return f"has no {what} '{field}' but {names}; rename the one with the text, or, for text_files, name it with text_field"


def _not_json(number: int, path: Path, reason: str) -> ConfigError:
    return ConfigError(f"line {number} of '{path}' is not JSON ({reason}); mend it, and give one array or one object a line")


def _is_utf8(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@contextmanager
def _complaints(path: Path, where: Callable[[], str]) -> Iterator[None]:
    """Whatever keeps a file from being read becomes one line."""
    try:
        yield
    except ConfigError:
        raise
    except (OSError, EOFError, ValueError, NotImplementedError, zlib.error) as error:  # cut or broken gzip; pyarrow's are the middle two
        reason = getattr(error, "strerror", None) or first_line(error)
        raise ConfigError(f"'{path}' cannot be read {where()}: {reason}; get it again, or give another file") from error
