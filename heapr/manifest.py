"""What an artifact's manifest says about its files: their hashes, and when and with what they were made.

In: a folder of finished files, or a manifest. Out: JSON types.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from heapr.files import fsync, hash_file, readable_by_umask
from heapr.measure import StageMeter

RECORDED_LIBRARIES = ("torch", "transformers", "safetensors", "tokenizers", "numpy")


def entry_of(manifest: Mapping[str, Any], part: str) -> Mapping[str, Any]:
    """The manifest's entry for a part, or for the artifact itself: files, seconds and peak memory."""
    entry: Mapping[str, Any] = manifest["parts"][part] if part else manifest
    return entry


def provenance(folder: Path, meter: StageMeter) -> dict[str, Any]:
    """Describe the files in a folder: when and with what they were made, their sizes and hashes.

    Also forces them to disk, and gives them the permissions of the umask, because safetensors writes files
    that only their owner can read.
    """
    files = {}
    for path in sorted(folder.rglob("*")):
        mode = 0o777 if path.is_dir() else 0o666
        path.chmod(readable_by_umask(mode))
        if path.is_file():
            files[path.relative_to(folder).as_posix()] = describe(path)
        fsync(path)
    return {
        "libraries": {name: importlib.metadata.version(name) for name in RECORDED_LIBRARIES},
        "git_commit": _git_commit(),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(meter.seconds, 3),
        "peak_memory_bytes": meter.peak_memory_bytes,
        "files": files,
    }


def describe(file: Path) -> dict[str, Any]:
    return {"size": file.stat().st_size, "sha256": hash_file(file)}


def _git_commit() -> str | None:
    """Commit of the code that runs, if git tracks it.

    Otherwise, a repository around it is somebody else's, such as one with a virtual environment in it.
    """
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        tracked = subprocess.run(
            [*git, "ls-files", Path(__file__).name], capture_output=True, text=True, check=False
        )
        result = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return result.stdout.strip() or None if tracked.stdout.strip() else None
