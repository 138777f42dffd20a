"""Reads text or chats from files of records: a field of JSON objects, or a column of a parquet file.

In: a path and the name of the field or column. Out: documents, in order. Errors in JSON name the line.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from heapr.errors import ConfigError
from heapr.text.chat import chat_field, conversation
from heapr.text.lines import complaints, is_utf8, lines

ROWS_AT_ONCE = 1024  # of parquet
NOT_JSON = (ValueError, RecursionError)  # what json raises, also for numbers and depths beyond its limits


def json_records(path: Path, field: str) -> Iterator[str]:
    """The text of every object: one object per line, or the elements of one array. Skips blank lines.

    Raises:
        ConfigError: a line or element is not JSON, or has no text in the field.
    """
    numbered = enumerate(lines(path), start=1)
    for number, line in numbered:
        if line.lstrip().startswith("["):
            blank = "\n" * (number - 1)  # so that the array's lines have the file's line numbers
            rest = [later for _, later in numbered]
            array = "".join([blank, line, *rest])
            yield from _Array(path, array).texts(field)
        elif line.strip():
            try:
                value = json.loads(line)
            except NOT_JSON as error:
                raise _not_json(number, path, _reason(error)) from error
            yield _text_of(value, field, number, path)


class _Array:
    """A JSON array, possibly of many lines, whose elements are decoded one at a time."""

    def __init__(self, path: Path, text: str) -> None:
        self._path, self._text = path, text
        self._decode = json.JSONDecoder().raw_decode

    def texts(self, field: str) -> Iterator[str]:
        """The text of every element."""
        position = self._skip_blanks(self._text.index("[") + 1)
        while not self._text.startswith("]", position):
            value, end = self._element(position)
            yield _text_of(value, field, self._line_of(position), self._path)
            position = self._behind_comma(end)
        behind = self._skip_blanks(position + 1)
        if behind < len(self._text):
            raise _not_json(self._line_of(behind), self._path, "there is more text after the array")

    def _element(self, position: int) -> tuple[Any, int]:
        """The value that begins at a position, and the position of its end."""
        try:
            return self._decode(self._text, position)
        except NOT_JSON as error:
            number = getattr(error, "lineno", None) or self._line_of(position)
            raise _not_json(number, self._path, _reason(error)) from error

    def _behind_comma(self, position: int) -> int:
        """The position of the next element, or of the array's end, after the end of an element."""
        position = self._skip_blanks(position)
        if self._text.startswith(",", position):
            return self._skip_blanks(position + 1)
        if not self._text.startswith("]", position):
            raise _not_json(self._line_of(position), self._path, "expected ',' or ']' after an element")
        return position

    def _skip_blanks(self, position: int) -> int:
        """The next position without white space."""
        while self._text[position : position + 1].isspace():
            position += 1
        return position

    def _line_of(self, position: int) -> int:
        return self._text.count("\n", 0, position) + 1


def parquet_rows(path: Path, column: str) -> Iterator[str]:
    """The rows of a text column, or the conversations of a column of chats; null is an empty row.

    Raises:
        ConfigError: the file is not parquet, or has no such column.
    """
    from pyarrow import types  # imported here because it takes a fraction of a second
    from pyarrow.parquet import ParquetFile

    with complaints(path, lambda: "as parquet"):
        # pre_buffer would read all row groups ahead.
        table = ParquetFile(path, pre_buffer=False)
        schema = table.schema_arrow
        chat = chat_field(column, schema.names)
        if chat is not None and types.is_list(schema.field(chat).type):
            yield from _parquet_chats(table, chat, path)
            return
        if column not in schema.names:
            raise ConfigError(f"'{path}' {_no_such_field('column', column, schema.names)}")
        kind = schema.field(column).type
        if types.is_dictionary(kind):
            kind = kind.value_type
        is_text = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
        if not is_text:
            hint = "rename the one with the text, or give another file"
            raise ConfigError(f"column '{column}' of '{path}' holds {kind}, not text; {hint}")
        for batch in table.iter_batches(ROWS_AT_ONCE, columns=[column]):
            rows = batch.column(0).cast("string").fill_null("")
            yield from rows.to_pylist()


def _parquet_chats(table: Any, column: str, path: Path) -> Iterator[str]:
    """The conversations of a column of pyarrow's `ParquetFile`."""
    number = 0
    for batch in table.iter_batches(ROWS_AT_ONCE, columns=[column]):
        for messages in batch.column(0).to_pylist():
            number += 1
            yield "" if messages is None else conversation(messages, f"row {number} of '{path}'")


def _text_of(value: Any, field: str, number: int, path: Path) -> str:
    """The text or conversation in a field of a JSON value; `number` is its line.

    Raises:
        ConfigError: it has neither.
    """
    where = f"line {number} of '{path}'"
    problem = _problem(value, field)
    if problem is not None:
        raise ConfigError(f"{where} {problem}")
    chat = chat_field(field, value)
    has_chat = chat is not None and not isinstance(value[chat], str)
    text: str = conversation(value[chat], where) if has_chat else value[field]
    if not is_utf8(text):
        surrogate = "a lone surrogate, \\ud800 to \\udfff"
        raise ConfigError(
            f"{where} has half a character in the field '{chat or field}' ({surrogate}); fix it or leave it"
            " out"
        )
    return text


def _problem(value: Any, field: str) -> str | None:
    """Why a JSON value has neither text nor a chat, and what to do about it; None if it has one."""
    expected = f"is not a JSON object with text in the field '{field}'"
    if not isinstance(value, dict):
        return f"{expected}, but a {type(value).__name__}; fix it"
    chat = chat_field(field, value)
    if chat is not None and (chat == field or isinstance(value[chat], list)):
        return None
    if field not in value:
        return _no_such_field("field", field, value)
    text = value[field]
    return None if isinstance(text, str) else f"{expected}, which holds {json.dumps(text):.40}; fix it"


def _no_such_field(what: str, field: str, known: Collection[str]) -> str:
    """What is wrong, and what to do, if the wanted field or column does not exist.

    Args:
        what: "field" or "column".
        field: the wanted name.
        known: the existing names.
    """
    names = ", ".join(known) or "nothing"
    hint = "rename the one with the text, or, for text_files, name it with text_field"
    return f"has no {what} '{field}' but {names}; {hint}"


def _not_json(number: int, path: Path, reason: str) -> ConfigError:
    hint = "fix it, and give one array or one object per line"
    return ConfigError(f"line {number} of '{path}' is not JSON ({reason}); {hint}")


def _reason(error: Exception) -> str:
    return str(getattr(error, "msg", error))
