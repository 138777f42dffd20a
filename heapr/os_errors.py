"""What the operating system refuses, in one line: no space, no permission, a folder that is gone.

In: an error, and the folder of results. Out: a `ConfigError`, or the error itself if it is not of that kind.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from heapr.errors import ConfigError

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
ELSEWHERE = "choose another folder with paths.outputs=..."
# What else may stand in the way of any file, and what to do about it.
ANYWHERE = {
    errno.EFBIG: "it is larger than the system allows; raise the limit (ulimit -f)",
    errno.EMFILE: "too many files are open; raise the limit (ulimit -n)",
    errno.ENFILE: "too many files are open on this machine; close some",
    errno.EIO: "the disk reports an error; check it, and start again",
    errno.ESTALE: "the file system has lost it; start again, and what was finished is found",
}
# The same for files in the folder of results only: elsewhere others know better what they mean.
IN_RESULTS = {
    errno.EROFS: f"its file system is read-only; {ELSEWHERE}",
    errno.ENOENT: "it was removed during the run; start again, and what was finished is found",
    errno.ENOTDIR: "a file is in the place of one of its folders; remove that, or " + ELSEWHERE,
    errno.EISDIR: "a folder is in its place; remove that, or " + ELSEWHERE,
    errno.ENOTEMPTY: "a folder is in its place; remove that, or " + ELSEWHERE,
    errno.ENAMETOOLONG: f"a path cannot be as long; {ELSEWHERE}",
    errno.ELOOP: f"links in it lead back to themselves; {ELSEWHERE}",
    errno.EEXIST: "something is in its place; remove that, or " + ELSEWHERE,
}
NOT_PERMITTED = (
    f"another user made it, or its folder; {ELSEWHERE}, or share this one: the same group, umask 002,"
    " chmod -R g+rwX"
)


@contextmanager
def one_line_about(folder: Path) -> Iterator[None]:
    """Turn what the operating system refuses inside into one clear line.

    Args:
        folder: of the results that are read and written inside.

    Raises:
        ConfigError: no space, no permission, or the like.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        line = explain_os_error(error, folder)
        if line is None:
            raise
        raise ConfigError(line) from error


def explain_os_error(error: OSError | SafetensorError, folder: Path) -> str | None:
    """One line on what was refused and what to do; None if the error is of another kind.

    Args:
        error: safetensors reports a full disk only in its message.
        folder: of results.
    """
    code = getattr(error, "errno", None)
    if code in NO_SPACE or any(f"os error {number}" in str(error) for number in NO_SPACE):
        return (
            f"no space left in '{folder}'; what was finished is kept: free some space and start again, or"
            f" {ELSEWHERE}"
        )
    filename = getattr(error, "filename", None)
    if code in ANYWHERE:
        return f"cannot read or write '{filename or folder}': {ANYWHERE[code]}"
    if isinstance(error, PermissionError):
        is_inside = filename is None or _is_below(filename, folder)
        return f"no permission for '{filename or folder}': {NOT_PERMITTED}" if is_inside else None
    if code in IN_RESULTS and filename is not None and _is_below(filename, folder):
        return f"cannot read or write '{filename}': {IN_RESULTS[code]}"
    return None


def _is_below(filename: str | bytes, folder: Path) -> bool:
    path = Path(str(filename)).absolute()
    return path == folder.absolute() or folder.absolute() in path.parents
