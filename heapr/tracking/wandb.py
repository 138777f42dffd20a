"""wandb: online when a key is found, else offline; it never prompts, and never waits long for the network.

In: values by name. Out: a wandb run, or an offline run folder and the command that sends it later. If wandb
fails, the run goes on, and a warning says why.
"""

from __future__ import annotations

import logging
import netrc
import os
import queue
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from heapr.errors import ConfigError
from heapr.network import PROBE_SECONDS, answers, within
from heapr.tracking.tracker import AXES, RATIO, Figure, Folder, Image, Run, Table, Value
from heapr.words import first_line

logger = logging.getLogger(__name__)

START_SECONDS = 12.0  # longest wait for a run to start online
MEDIA_SECONDS = 8.0  # longest wait for tables, images and folders at the end of a run
FINISH_SECONDS = 8.0  # longest wait for the rest after that; what is not sent stays on disk
UPLOAD_SLICE_SECONDS = 10.0  # an upload on request has no limit; so often we check that wandb still answers
# From WANDB_MODE to our modes.
MODES = {
    "online": "online",
    "run": "online",
    "offline": "offline",
    "dryrun": "offline",
    "disabled": "none",
}
MAX_TAG = 64  # letters that wandb allows


class Wandb:
    """One wandb run.

    Args:
        run: its name, id and configuration.
        mode: "online" or "offline", as `resolve_mode` gives it.
        project: of wandb.
        upload: whether to send the files of folders, or only their paths.
        folder: where wandb keeps its files; created if it does not exist.
    """

    def __init__(self, run: Run, *, mode: str, project: str, upload: bool, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._upload = upload
        self._defined = set(AXES)
        self._warned: set[str] = set()
        arguments: dict[str, Any] = {
            "dir": str(folder.resolve()),
            "project": project,
            "name": run.name,
            "id": run.id,
            "group": run.group,
            "job_type": run.job_type,
            "tags": [tag[:MAX_TAG] for tag in run.tags],
            "config": dict(run.config),
        }
        self._run, self._mode = _start(mode, arguments)
        self._media: queue.Queue[Mapping[str, Value] | None] = queue.Queue()
        # In a thread, because wandb waits for an answer to each of them.
        self._courier = threading.Thread(target=self._log_media, daemon=True)
        self._courier.start()

    def log(self, values: Mapping[str, Value]) -> None:
        if self._run is None:
            return
        media: dict[str, Value] = {}
        row: dict[str, Value] = {}
        for name, value in values.items():
            kind = media if isinstance(value, Table | Image | Figure | Folder) else row
            kind[name] = value
        if media:
            self._media.put(media)
        try:
            self._log_row(row)
        except Exception as error:
            # wandb documents no exceptions of its own, and the run must go on.
            self._warn(error)

    def close(self, *, succeeded: bool) -> None:
        if self._run is None:
            return
        folder = Path(self._run.dir).parent
        try:
            self._wait_for_media()
            self._run.finish(exit_code=0 if succeeded else 1)
            is_sent = self._mode == "online" and not self._warned
        except TimeoutError as error:
            is_sent = False
            self._warn(error)
        except Exception as error:
            is_sent = False
            self._warn(error)
            _stop_service()
        if not is_sent and folder.is_dir():
            logger.info("wandb keeps on disk what is not sent yet; to send it later: wandb sync %s", folder)

    def _log_row(self, row: dict[str, Any]) -> None:
        axes = [name for name in AXES if name in row]
        undefined = [name for name in row if name not in self._defined]
        if axes:
            for name in undefined:
                self._defined.add(name)
                self._run.define_metric(name, step_metric=axes[0])
        if RATIO in row:
            # wandb takes a dot in the name of an axis for a nested value.
            section, field = RATIO.split(".")
            row[section] = {field: row.pop(RATIO)}
        if row:
            self._run.log(row)

    def _log_media(self) -> None:
        """Log media from the queue, in a thread of its own, until the queue gives None or wandb fails."""
        try:
            while (values := self._media.get()) is not None:
                folders = [value for value in values.values() if isinstance(value, Folder)]
                for folder in folders:
                    self._log_folder(folder)
                others = {name: value for name, value in values.items() if not isinstance(value, Folder)}
                if others:
                    converted = {name: _converted(value) for name, value in others.items()}
                    self._run.log(converted)
        except Exception as error:
            self._warn(error)

    def _log_folder(self, folder: Folder) -> None:
        import wandb

        artifact = wandb.Artifact(f"{folder.stage}-{folder.key}", folder.stage, metadata={"key": folder.key})
        if not self._upload:
            # The store's manifest has the hashes.
            artifact.add_reference(folder.path.resolve().as_uri(), checksum=False)
            self._run.log_artifact(artifact)
            return
        artifact.add_dir(str(folder.path), policy="immutable", skip_cache=True)
        self._run.log_artifact(artifact)
        if self._mode == "online":
            artifact.wait()

    def _wait_for_media(self) -> None:
        """Wait until all media are logged.

        Offline there is no limit, since only the disk is involved. Online the wait ends after
        `MEDIA_SECONDS`, or with an upload, as soon as wandb does not answer.
        """
        self._media.put(None)
        self._courier.join(MEDIA_SECONDS if self._mode == "online" else None)
        while self._upload and self._courier.is_alive() and is_reachable():
            self._courier.join(UPLOAD_SLICE_SECONDS)
        if self._courier.is_alive():
            self._warn(TimeoutError("tables, figures or artifacts were not taken in time"))

    def _warn(self, error: Exception) -> None:
        """Warn once for each reason: calibration would repeat it every second."""
        reason = first_line(error)
        if reason not in self._warned:
            self._warned.add(reason)
            logger.warning(
                "wandb failed (%s); the run goes on, and its tracking.jsonl has everything", reason
            )


def resolve_mode(mode: str) -> str:
    """Return "online", "offline" or "none".

    Args:
        mode: one of these, or "auto": as WANDB_MODE says, else online if a key is found, else offline.

    Raises:
        ConfigError: the mode is online but there is no key, so that wandb would prompt for one; or WANDB_MODE
            is unknown.
    """
    if mode == "auto" and (asked := os.environ.get("WANDB_MODE")):
        if asked not in MODES:
            raise ConfigError(
                f"WANDB_MODE='{asked}' is unknown; choose one of {', '.join(MODES)}, or unset it"
            )
        mode = MODES[asked]
        if mode == "none":
            logger.info("WANDB_MODE=%s: nothing goes to wandb", asked)
    if mode == "auto":
        mode = "online" if has_key() else "offline"
    if mode == "online" and not has_key():
        raise ConfigError(
            "wandb must be online, but no key is found; set WANDB_API_KEY, run wandb login, or use"
            " tracking=wandb_offline"
        )
    return mode


def has_key() -> bool:
    """Return whether wandb finds a key without prompting: in the environment or in the netrc file."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(_host()) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _start(mode: Any, arguments: dict[str, Any]) -> tuple[Any, str]:
    """Start a run; offline if it cannot start online.

    Returns:
        The run, or None if wandb cannot start one; and its mode.
    """
    # wandb's error reports wait for the network at exit.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    # The import takes seconds.
    import wandb

    settings = wandb.Settings(
        init_timeout=START_SECONDS,
        finish_timeout=FINISH_SECONDS,
        finish_timeout_raises=True,
        silent=True,
        console="off",
    )
    if mode == "online":
        try:
            if is_reachable():
                return wandb.init(mode="online", resume="allow", settings=settings, **arguments), mode
            reason = f"{_host()} does not answer"
        except Exception as error:
            reason = first_line(error)
            # A running service would not let the id be used again.
            _stop_service()
        logger.warning("wandb cannot be reached (%s); the run goes on offline", reason)
        mode = "offline"
    try:
        return wandb.init(mode=mode, settings=settings, **arguments), mode
    except Exception as error:
        logger.warning("wandb cannot start (%s); the run goes on without it", first_line(error))
        _stop_service()
        return None, mode


def _stop_service() -> None:
    """End wandb's own process, so that the next run starts a new one."""
    import wandb

    # The process may be dead already.
    within(PROBE_SECONDS, wandb.teardown)


def is_reachable() -> bool:
    """Return whether wandb's server answers."""
    return answers(_endpoint())


def _host() -> str:
    return urlparse(_endpoint()).hostname or ""


def _endpoint() -> str:
    return os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")


def _converted(value: Value) -> Any:
    import wandb

    if isinstance(value, Table):
        rows = [list(row) for row in value.rows]
        return wandb.Table(columns=list(value.columns), data=rows, allow_mixed_types=True)
    if isinstance(value, Figure):
        return _drawn(value)
    return wandb.Image(str(value.path)) if isinstance(value, Image) else value


def _drawn(figure: Figure) -> Any:
    """Draw a figure, and keep it in memory until wandb has taken it."""
    import wandb
    from PIL import Image as Picture

    with tempfile.TemporaryDirectory() as folder:
        path = figure.draw(Path(folder) / "figure.png")
        with Picture.open(path) as picture:
            return wandb.Image(picture.copy())
