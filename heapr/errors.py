"""The one error for mistakes that a user can fix."""

from __future__ import annotations


class ConfigError(ValueError):
    """A user's mistake. The message says what was given, why it cannot be, and what to do."""


class TooLargeError(ConfigError):
    """A model does not fit into memory."""


class NotHereError(ConfigError):
    """A text or device that was asked for is not on this machine."""
