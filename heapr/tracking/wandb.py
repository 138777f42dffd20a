"""wandb: online when a key is found, otherwise offline; never asks, never waits for the network for long.

In: numbers by name. Out: a wandb run, or an offline run folder and the command that sends it later.
"""

from __future__ import annotations

import logging
import netrc
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

logger = logging.getLogger(__name__)

INIT_TIMEOUT_SECONDS = 20


class Wandb:
    """One wandb run.

    Args:
        mode: "online", "offline", or "auto": online if a key is found.
        folder: where wandb keeps its files; made if it is not there.
        project, name: as wandb shows the run.
        config: the whole resolved configuration.
    """

    def __init__(self, mode: str, *, folder: Path, project: str, name: str, config: Mapping[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._run = _start(resolve_mode(mode), {"dir": str(folder), "project": project, "name": name, "config": dict(config)})

    def log(self, values: Mapping[str, Any]) -> None:
        self._run.log(dict(values))

    def close(self) -> None:
        offline, folder = self._run.settings._offline, self._run.dir
        self._run.finish()
        if offline:
            logger.info("wandb ran offline; to send it later: wandb sync %s", Path(folder).parent)


def resolve_mode(mode: str) -> Any:
    """ "online" or "offline" (or what WANDB_MODE says, if it is set)."""
    if mode != "auto":
        return mode
    if "WANDB_MODE" in os.environ:
        return os.environ["WANDB_MODE"]
    return "online" if has_key() else "offline"


def has_key() -> bool:
    """Whether wandb would find a key without asking: in the environment or in ~/.netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _start(mode: Any, arguments: dict[str, Any]) -> Any:
    import wandb  # seconds to import: only when it is used

    settings = wandb.Settings(init_timeout=INIT_TIMEOUT_SECONDS, silent=True, console="off")
    if mode == "online":
        try:
            return wandb.init(mode=mode, settings=settings, **arguments)
        except (wandb.errors.Error, TimeoutError) as error:
            logger.warning("wandb cannot be reached (%s); it goes on offline", str(error).split("\n", 1)[0])
            mode = "offline"
    return wandb.init(mode=mode, settings=settings, **arguments)
