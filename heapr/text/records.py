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
READ_ON = 1 << 16  # characters of an array
NOT_JSON = (ValueError, RecursionError)  # what json raises, also for numbers and depths beyond its limits


def json_records(path: Path, field: str) -> Iterator[str]:
    """The text of every object: one object per line, or the elements of one array. Skips blank lines.

    Raises:
        ConfigError: a line or element is not JSON, or has no text in the field.
    """
    found = lines(path)
    for number, line in enumerate(found, start=1):
        if line.lstrip().startswith("["):
            yield from _Array(path, line, number, found).texts(field)
            return
        if line.strip():
            try:
                value = json.loads(line)
            except NOT_JSON as error:
                raise _not_json(number, path, _reason(error)) from error
            yield _text_of(value, field, number, path)


class _Array:
    """A JSON array, possibly of many lines, whose elements are decoded one at a time.

    Lines are read as they are needed, so memory holds a few elements, or a line if that is longer.

    Args:
        path: of the file, for messages.
        text: the line that the array begins in.
        number: of that line.
        further: the lines behind it.
    """

    def __init__(self, path: Path, text: str, number: int, further: Iterator[str]) -> None:
        self._path, self._further = path, further
        self._text = text  # what has been read and not been dropped yet
        self._position = 0  # in the text; what is before it is done
        self._number = number  # of the line that the position is in
        self._decode = json.JSONDecoder().raw_decode

    def texts(self, field: str) -> Iterator[str]:
        """The text of every element."""
        self._go_to(self._text.index("[") + 1)
        self._skip_blanks()
        while not self._is_at("]"):
            number = self._number
            value = self._element()
            yield _text_of(value, field, number, self._path)
            self._skip_comma()
        self._go_to(self._position + 1)
        self._skip_blanks()
        if self._position < len(self._text):
            raise _not_json(self._number, self._path, "there is more text after the array")

    def _element(self) -> Any:
        """The value that begins here; then the position is behind it."""
        while True:
            try:
                value, end = self._decode(self._text, self._position)
            except NOT_JSON as error:
                place = getattr(error, "pos", self._position)
                # Strings end in the line they begin in, so what is cut off ends with the text.
                is_cut = not self._text[place:].strip()
                if is_cut and self._read_on():
                    continue
                self._go_to(place)
                raise _not_json(self._number, self._path, _reason(error)) from error
            self._go_to(end)
            return value

    def _skip_comma(self) -> None:
        """Go from the end of an element to the next one, or to the end of the array."""
        self._skip_blanks()
        if self._is_at(","):
            self._go_to(self._position + 1)
            self._skip_blanks()
        elif not self._is_at("]"):
            raise _not_json(self._number, self._path, "expected ',' or ']' after an element")

    def _skip_blanks(self) -> None:
        """Go to the next character that is not white space, or to the end of the file."""
        is_more = True
        while is_more:
            place = self._position
            while self._text[place : place + 1].isspace():
                place += 1
            self._go_to(place)
            is_more = place == len(self._text) and self._read_on()

    def _is_at(self, character: str) -> bool:
        return self._text.startswith(character, self._position)

    def _go_to(self, position: int) -> None:
        self._number += self._text.count("\n", self._position, position)
        self._position = position

    def _read_on(self) -> bool:
        """Drop what is done, and read as much again as is left; False at the end of the file."""
        rest = self._text[self._position :]
        parts = [rest]
        num_missing = max(READ_ON, len(rest))
        for line in self._further:
            parts.append(line)
            num_missing -= len(line)
            if num_missing <= 0:
                break
        self._text, self._position = "".join(parts), 0
        return len(parts) > 1


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
