"""The one error for mistakes that a user can fix."""

from __future__ import annotations


class ConfigError(ValueError):
    """A user's mistake. The message says what was given, why it cannot be, and what to do."""


class TooLargeError(ConfigError):
    """A model does not fit into memory."""


class NotHereError(ConfigError):
    """A text or device that was asked for is not on this machine."""


class RankEnded(BaseException):
    """One of several processes of an experiment ended, and so the others end too.

    Attributes:
        line: what this process says about it; empty if another one says it.
        code: its exit code.
    """

    def __init__(self, line: str, code: int) -> None:
        super().__init__(line)
        self.line, self.code = line, code
