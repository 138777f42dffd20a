"""Output that nobody reads: `heapr --help | head` ends without a word."""

from __future__ import annotations

import io
import os
import sys

import pytest

from heapr.unread_output import UNREAD, until_nobody_reads


def closed_pipe() -> io.TextIOWrapper:
    """An output whose other end is closed."""
    reader, writer = os.pipe()
    os.close(reader)
    return io.TextIOWrapper(io.BufferedWriter(io.FileIO(writer, "w")), encoding="utf-8")


@pytest.mark.parametrize("size", [1, 1 << 20])
def test_a_closed_pipe_ends_in_silence_whether_its_buffer_was_full_or_not(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = closed_pipe()
    monkeypatch.setattr(sys, "stdout", output)
    with pytest.raises(SystemExit) as ended, until_nobody_reads():
        output.write("a" * size)
    assert ended.value.code == UNREAD == 141
    output.close()  # as at the end of Python: what is left is lost without an error


def test_a_closed_pipe_to_somebody_else_stays_an_error() -> None:
    with pytest.raises(BrokenPipeError), until_nobody_reads():
        raise BrokenPipeError
