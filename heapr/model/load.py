"""Find, check, identify and load a model and its tokenizer.

In: a built-in name, a local folder or a hub id. Out: `ModelSource` (cheap: no weights are read) and from it a `MoEModel`.
Every mistake that can be seen in the configuration is refused before weights are loaded.
"""

from __future__ import annotations

import hashlib
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlparse

import huggingface_hub
import torch
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from heapr.errors import ConfigError
from heapr.files import hash_file
from heapr.model.moe import MoEModel, find_moe_layers

BUILTIN_PREFIX = "builtin:"
BUILTIN_FOLDER = Path(__file__).parent / "builtin"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HUB_TIMEOUT_SECONDS = 3.0
FILES_WANTED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


@dataclass(frozen=True)
class ModelSource:
    """A model that was found and checked, not yet loaded.

    Attributes:
        folder: local folder with config, weights and tokenizer.
        identity: what the model is: hub id and commit, or a hash of the folder's content; and the dtype.
        dtype: dtype of the loaded weights.
        config: transformers' configuration.
    """

    folder: Path
    identity: dict[str, str]
    dtype: torch.dtype
    config: PretrainedConfig

    @property
    def max_sequence_length(self) -> int | None:
        """Most tokens in a sequence, where the configuration names a limit."""
        return getattr(self.config.get_text_config(), "max_position_embeddings", None)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return AutoTokenizer.from_pretrained(self.folder)

    def load(self, device: torch.device) -> MoEModel:
        """Load the weights.

        Raises:
            ConfigError: weights are missing or do not fit the configuration.
        """
        try:
            with _bar_on_terminals_only():
                model = AutoModelForCausalLM.from_pretrained(self.folder, config=self.config, dtype=self.dtype, local_files_only=True)
        except (OSError, RuntimeError) as error:
            raise ConfigError(f"the weights in '{self.folder}' cannot be loaded: {_first_line(error)}") from error
        moe = MoEModel(model.to(device))
        moe.check_head()
        return moe


def find_model(path: str, *, dtype: str, revision: str | None = None) -> ModelSource:
    """Find a model and check all that can be checked without its weights.

    Args:
        path: "builtin:<name>", a local folder, or a hub id.
        dtype: "float32", "bfloat16" or "float16".
        revision: branch, tag or commit of a hub id; its commit enters the identity.

    Raises:
        ConfigError: no such model, not a Mixture-of-Experts model, a missing capability, an unknown dtype.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"model.dtype='{dtype}' is unknown; choose one of {', '.join(DTYPES)}")
    folder, identity = _locate(path, revision)
    config = _read_config(folder)
    _check_architecture(config, path)
    return ModelSource(folder=folder, identity={**identity, "dtype": dtype}, dtype=DTYPES[dtype], config=config)


def hash_folder(folder: Path) -> str:
    """sha256 over names and contents of the files that make a model: configuration, weights, tokenizer."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix != ".md":
            digest.update(f"{path.name}\0{hash_file(path)}\0".encode())
    return digest.hexdigest()


def _locate(path: str, revision: str | None) -> tuple[Path, dict[str, str]]:
    if path.startswith(BUILTIN_PREFIX):
        folder = BUILTIN_FOLDER / path.removeprefix(BUILTIN_PREFIX)
        if not folder.is_dir():
            known = sorted(BUILTIN_PREFIX + entry.name for entry in BUILTIN_FOLDER.iterdir() if entry.is_dir())
            raise ConfigError(f"model.path='{path}': no such built-in model; known: {', '.join(known)}")
        return folder, {"sha256": hash_folder(folder)}
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder, {"sha256": hash_folder(folder)}
    if not _is_hub_id(path):
        raise ConfigError(f"model.path='{path}': no such folder; give a folder with config.json and safetensors, or a hub id 'owner/name'")
    return _download(path, revision)


def _is_hub_id(path: str) -> bool:
    return path.count("/") == 1 and not path.startswith(("/", ".", "~")) and not path.endswith("/")


def _download(hub_id: str, revision: str | None) -> tuple[Path, dict[str, str]]:
    """Folder and identity of a hub model: from the local cache if it is there, else from the hub."""
    try:
        folder = huggingface_hub.snapshot_download(hub_id, revision=revision, allow_patterns=FILES_WANTED, local_files_only=True)
    except LocalEntryNotFoundError:
        if not _hub_is_reachable():
            raise ConfigError(
                f"model.path='{hub_id}' is neither a local folder nor in the local hub cache, and the hub cannot be reached; "
                "download it where there is a network (hf download) or give a local folder"
            ) from None
        try:
            folder = huggingface_hub.snapshot_download(hub_id, revision=revision, allow_patterns=FILES_WANTED)
        except (RepositoryNotFoundError, HfHubHTTPError, OSError) as error:
            raise ConfigError(f"model.path='{hub_id}' cannot be downloaded: {_first_line(error)}") from error
    return Path(folder), {"hub": hub_id, "commit": Path(folder).name}


def _hub_is_reachable() -> bool:
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return False
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True  # only the proxy can tell
    endpoint = urlparse(huggingface_hub.constants.ENDPOINT)
    try:
        port = endpoint.port or (443 if endpoint.scheme == "https" else 80)
        socket.create_connection((endpoint.hostname or "", port), timeout=HUB_TIMEOUT_SECONDS).close()
    except OSError:
        return False
    return True


def _read_config(folder: Path) -> PretrainedConfig:
    if not (folder / "config.json").is_file():
        raise ConfigError(f"folder '{folder}' has no config.json, so it is not a Hugging Face model; give one that has")
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except (ValueError, KeyError, OSError) as error:
        raise ConfigError(f"config.json in '{folder}' cannot be used: {_first_line(error)}") from error


def _check_architecture(config: PretrainedConfig, path: str) -> None:
    """Build the model without memory and look for MoE layers and missing capabilities."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        raise ConfigError(f"model.path='{path}' is not a causal language model: {_first_line(error)}") from error
    find_moe_layers(model)


@contextmanager
def _bar_on_terminals_only() -> Iterator[None]:
    """transformers' bar over the weights is noise in a log file."""
    shown = transformers_logging.is_progress_bar_enabled()
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]
