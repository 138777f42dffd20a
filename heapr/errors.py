"""The one error for mistakes a user can mend, and its way to the console: one line, exit code 2."""

from __future__ import annotations


class ConfigError(ValueError):
    """A user's mistake. The message says what was given, why it cannot be, and what to do."""
