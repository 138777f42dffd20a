"""wandb: online when a key is found, otherwise offline; never asks, never waits for the network for long.

In: numbers by name. Out: a wandb run, or an offline run folder and the command that sends it later.
"""

from __future__ import annotations

import logging
import netrc
import os
import socket
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from heapr.errors import ConfigError

logger = logging.getLogger(__name__)

PROBE_SECONDS = 3.0  # is anybody there?
START_SECONDS = 20  # most that starting a run online may take
FINISH_SECONDS = 60.0  # most that sending the rest may take; what is left is on disk


class Wandb:
    """One wandb run.

    Args:
        mode: as `resolve_mode` gives it.
        folder: where wandb keeps its files; made if it is not there.
        project, name: as wandb shows the run.
        config: the whole resolved configuration.
    """

    def __init__(self, mode: Any, *, folder: Path, project: str, name: str, config: Mapping[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._run = _start(mode, {"dir": str(folder), "project": project, "name": name, "config": dict(config)})

    def log(self, values: Mapping[str, Any]) -> None:
        self._run.log(dict(values))

    def close(self, *, succeeded: bool) -> None:
        folder = Path(self._run.dir).parent
        finish = threading.Thread(target=self._run.finish, kwargs={"exit_code": 0 if succeeded else 1}, daemon=True)
        finish.start()
        finish.join(FINISH_SECONDS)
        if finish.is_alive() or self._run.settings._offline:
            logger.info("wandb has what is not sent yet on disk; to send it later: wandb sync %s", folder)


def resolve_mode(mode: str) -> Any:
    """ "online" or "offline", from "auto" (online if a key is found) or as asked; WANDB_MODE decides where "auto" was asked.

    Raises:
        ConfigError: online without a key: wandb would ask for one.
    """
    if mode == "auto":
        mode = os.environ.get("WANDB_MODE") or ("online" if has_key() else "offline")
    if mode == "online" and not has_key():
        raise ConfigError("wandb is to be online, but no key is found; set WANDB_API_KEY, run wandb login, or use tracking=wandb_offline")
    return mode


def has_key() -> bool:
    """Whether wandb would find a key without asking: in the environment or in the netrc file."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(_endpoint()[0]) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _endpoint() -> tuple[str, int]:
    url = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    return url.hostname or "", url.port or (443 if url.scheme == "https" else 80)


def _is_reachable() -> bool:
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True  # only the proxy can tell
    try:
        socket.create_connection(_endpoint(), timeout=PROBE_SECONDS).close()
    except OSError:
        return False
    return True


def _start(mode: Any, arguments: dict[str, Any]) -> Any:
    import wandb  # seconds to import: only when it is used

    settings = wandb.Settings(init_timeout=START_SECONDS, silent=True, console="off")
    if mode == "online":
        try:
            if _is_reachable():
                return wandb.init(mode=mode, settings=settings, **arguments)
            reason = f"{_endpoint()[0]} does not answer"
        except (wandb.errors.Error, TimeoutError) as error:
            reason = str(error).split("\n", 1)[0]
        logger.warning("wandb cannot be reached (%s); the run goes on offline", reason)
        mode = "offline"
    return wandb.init(mode=mode, settings=settings, **arguments)
