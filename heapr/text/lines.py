"""Lines of a file of text, compressed or not.

In: a path. Out: lines of UTF-8 text, and one clear complaint about anything that cannot be read.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from heapr.errors import ConfigError
from heapr.words import first_line

GZIP = ".gz"  # last ending of a compressed file's name
UNREADABLE = (OSError, EOFError, zlib.error, ValueError, NotImplementedError)  # the last two are pyarrow's
BYTE_ORDER_MARK = "\ufeff"


def lines(path: Path) -> Iterator[str]:
    r"""Lines of a file with "\n" at their ends, whatever the line ends of the file.

    Raises:
        ConfigError: the file cannot be read, is not UTF-8 or holds a zero byte.
    """
    number = 0
    opened = gzip.open if path.name.lower().endswith(GZIP) else open
    with (
        complaints(path, lambda: f"after line {number}"),
        opened(path, "rt", encoding="utf-8", errors="surrogateescape") as file,  # bad bytes: surrogates
    ):
        for number, line in enumerate(file, start=1):
            where = f"line {number} of '{path}'"
            if not is_utf8(line):
                raise ConfigError(f"{where} is not UTF-8; convert the file, for example with iconv")
            if "\0" in line:
                raise ConfigError(f"{where} holds a zero byte, which no text does; convert the file to UTF-8")
            yield line.removeprefix(BYTE_ORDER_MARK)  # at the beginning, and where files were put together


def is_utf8(text: str) -> bool:
    """Whether UTF-8 can hold a text: it has no lone surrogates."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@contextmanager
def complaints(path: Path, where: Callable[[], str]) -> Iterator[None]:
    """Whatever keeps a file from being read becomes one line.

    Args:
        path: the file.
        where: how far it was read, or as what.
    """
    try:
        yield
    except ConfigError:
        raise
    except UNREADABLE as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        problem = f"'{path}' cannot be read {where()}: {reason}"
        raise ConfigError(f"{problem}; get it again, or give another file") from error
