"""The run's log file: where it cannot be written any more, one line says so, and the run goes on.

In: log records. Out: lines in a file. conf/hydra/job_logging names the class.
"""

from __future__ import annotations

import logging
import sys


class LogFile(logging.FileHandler):
    """A log file that does not print a stack trace for every line when the disk is full."""

    _has_failed = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's own name
        """Say once why the log ends. A mistake of ours, such as a wrong format, keeps its stack trace."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._has_failed:
            self._has_failed = True
            sys.stderr.write(
                f"cannot write '{self.baseFilename}': {error.strerror}; the log goes on here alone\n"
            )

    def close(self) -> None:
        """Close the file; what is still in its buffer may have no room."""
        try:
            super().close()
        except OSError:
            self.stream = None
