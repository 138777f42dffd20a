"""Reads the lines of a text file, compressed or not.

In: a path. Out: lines of UTF-8 text, or one clear error for a file that cannot be read.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from heapr.errors import ConfigError
from heapr.words import first_line

GZIP = ".gz"  # how the name of a compressed file ends
UNREADABLE = (OSError, EOFError, zlib.error, ValueError, NotImplementedError)  # the last two are pyarrow's
BYTE_ORDER_MARK = "\ufeff"


def lines(path: Path) -> Iterator[str]:
    r"""The lines of a file, each ending in "\n", whatever line ends the file has.

    Raises:
        ConfigError: the file cannot be read, is not UTF-8 or holds a zero byte.
    """
    number = 0
    opened = gzip.open if path.name.lower().endswith(GZIP) else open
    with (
        complaints(path, lambda: f"after line {number}"),
        opened(path, "rt", encoding="utf-8", errors="surrogateescape") as file,  # `is_utf8` finds bad bytes
    ):
        for number, line in enumerate(file, start=1):
            where = f"line {number} of '{path}'"
            if not is_utf8(line):
                raise ConfigError(f"{where} is not UTF-8; convert the file, for example with iconv")
            if "\0" in line:
                raise ConfigError(
                    f"{where} holds a zero byte, which text never does; convert the file to UTF-8"
                )
            # A mark stands at the beginning, and wherever files were concatenated.
            yield line.removeprefix(BYTE_ORDER_MARK)


def is_utf8(text: str) -> bool:
    """Whether a text can be encoded in UTF-8: it has no lone surrogates."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@contextmanager
def complaints(path: Path, where: Callable[[], str]) -> Iterator[None]:
    """Turn every error of reading a file into a `ConfigError` of one line.

    Args:
        path: the file.
        where: describes how far, or in which format, it was read.
    """
    try:
        yield
    except ConfigError:
        raise
    except UNREADABLE as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        problem = f"'{path}' cannot be read {where()}: {reason}"
        raise ConfigError(f"{problem}; get it again, or give another file") from error
