"""Find, check, identify and load a model and its tokenizer.

In: a built-in name, a local folder or a hub id. Out: `ModelSource` (cheap: no weights are loaded, and none downloaded) and
from it a `MoEModel`. Every mistake that can be seen in configuration and tokenizer is refused here.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from heapr.errors import ConfigError
from heapr.files import hash_file, hash_file_once
from heapr.hub import hub_is_reachable
from heapr.model.moe import MoEModel, find_moe_layers

BUILTIN_PREFIX = "builtin:"
BUILTIN_FOLDER = Path(__file__).parent / "builtin"
DESCRIPTION_FILES = ["*.json", "*.model", "*.txt", "*.jinja"]
WEIGHT_FILES = ["*.safetensors"]


@dataclass(frozen=True)
class ModelSource:
    """A model that was found and checked, not yet loaded.

    Attributes:
        folder: local folder with configuration and tokenizer; of a hub model, the cache's.
        identity: what the model is: hub id and commit, or a hash of the folder's content; and the dtype.
        dtype: of the loaded weights.
        config: transformers' configuration.
        tokenizer: the model's own.
        layer_sizes: atomic experts of each MoE layer.
    """

    folder: Path
    identity: dict[str, str]
    dtype: torch.dtype
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    layer_sizes: list[int]

    @property
    def max_sequence_length(self) -> int | None:
        """Most tokens in a sequence, where the configuration names a limit."""
        return getattr(self.config.get_text_config(), "max_position_embeddings", None)

    @property
    def has_weights(self) -> bool:
        """Whether every file of weights is in the folder."""
        index = self.folder / "model.safetensors.index.json"
        names = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else {"model.safetensors"}
        return all((self.folder / name).is_file() for name in names)

    def load(self, device: torch.device) -> MoEModel:
        """Load the weights; of a hub model, download them first.

        Raises:
            ConfigError: weights are missing, damaged, or do not fit the configuration.
        """
        self.fetch()
        model = MoEModel(self._load_weights().to(device))
        model.check_head()
        return model

    def fetch(self) -> None:
        """Download the weights of a hub model; a local one has them.

        Raises:
            ConfigError: they cannot be downloaded.
        """
        if "hub" in self.identity:
            _download(self.identity["hub"], self.identity["commit"], DESCRIPTION_FILES + WEIGHT_FILES)

    def _load_weights(self) -> PreTrainedModel:
        try:
            with _bar_on_terminals_only():
                model, found = AutoModelForCausalLM.from_pretrained(
                    self.folder, config=self.config, dtype=self.dtype, local_files_only=True, output_loading_info=True
                )
        except (OSError, RuntimeError, SafetensorError) as error:
            raise ConfigError(f"the weights in '{self.folder}' cannot be loaded: {_first_line(error)}; get them again") from error
        for problem in ("missing_keys", "mismatched_keys"):
            if found.get(problem):
                names = sorted(str(name) for name in found[problem])
                what = f"{problem.replace('_', ' ')} {names[0]} and {len(names) - 1} more"
                raise ConfigError(f"the weights in '{self.folder}' do not fit its config.json: {what}; get them again")
        return model


def find_model(path: str, *, dtype: str, revision: str | None = None, digests: Path | None = None) -> ModelSource:
    """Find a model and check all that can be checked without its weights.

    Args:
        path: "builtin:<name>", a local folder, or a hub id.
        dtype: name of a torch dtype.
        revision: branch, tag or commit of a hub id; its commit enters the identity.
        digests: folder in which hashes of large local weights are remembered.

    Raises:
        ConfigError: no such model, not a Mixture-of-Experts model, a missing capability, no usable tokenizer.
    """
    if path.startswith(BUILTIN_PREFIX):
        folder = _builtin(path.removeprefix(BUILTIN_PREFIX))
        identity = {"sha256": hash_folder(folder)}
    elif Path(path).expanduser().is_dir():
        folder = Path(path).expanduser()
        identity = {"sha256": hash_folder(folder, digests)}
    elif path.count("/") == 1 and not path.startswith(("/", ".", "~")):
        folder = _download(path, revision, DESCRIPTION_FILES)
        identity = {"hub": path, "commit": folder.name}
    else:
        raise ConfigError(f"model.path='{path}': no such folder; give a folder with config.json and safetensors, or a hub id 'owner/name'")
    config = _read_config(folder)
    sizes = _layer_sizes(config, path)
    tokenizer = _read_tokenizer(folder, config)
    return ModelSource(folder, {**identity, "dtype": dtype}, getattr(torch, dtype), config, tokenizer, sizes)


def hash_folder(folder: Path, digests: Path | None = None) -> str:
    """sha256 over names and contents of the files that make a model: configuration, weights, tokenizer."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in DESCRIPTION_FILES + WEIGHT_FILES for path in folder.glob(pattern)):
        remembered = digests is not None and path.suffix == ".safetensors"
        content = hash_file_once(path, digests) if remembered and digests else hash_file(path)
        digest.update(f"{path.name}\0{content}\0".encode())
    return digest.hexdigest()


def _builtin(name: str) -> Path:
    known = sorted(entry.name for entry in BUILTIN_FOLDER.iterdir() if entry.is_dir())
    if name not in known:
        raise ConfigError(
            f"model.path='{BUILTIN_PREFIX}{name}': no such built-in model; known: {', '.join(BUILTIN_PREFIX + n for n in known)}"
        )
    return BUILTIN_FOLDER / name


def _download(hub_id: str, revision: str | None, patterns: list[str]) -> Path:
    """Folder of a hub model with the wanted files: the hub is asked if it can be reached, else the local cache."""
    online = hub_is_reachable()
    try:
        folder = huggingface_hub.snapshot_download(hub_id, revision=revision, allow_patterns=patterns, local_files_only=not online)
    except LocalEntryNotFoundError:
        raise ConfigError(
            f"model.path='{hub_id}' is neither a local folder nor in the local hub cache, and the hub cannot be reached; "
            "download it where there is a network (hf download) or give a local folder"
        ) from None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ConfigError(f"model.path='{hub_id}' cannot be downloaded: {_first_line(error)}") from error
    return Path(folder)


def _read_config(folder: Path) -> PretrainedConfig:
    if not (folder / "config.json").is_file():
        raise ConfigError(f"folder '{folder}' has no config.json, so it is not a Hugging Face model; give one that has")
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except (ValueError, KeyError, OSError) as error:
        raise ConfigError(f"config.json in '{folder}' cannot be used: {_first_line(error)}") from error


def _layer_sizes(config: PretrainedConfig, path: str) -> list[int]:
    """Build the model without memory: refuses what has no MoE layer or needs a missing capability."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        raise ConfigError(f"model.path='{path}' is not a causal language model: {_first_line(error)}") from error
    return [sum(layer.widths) for layer in find_moe_layers(model)]


def _read_tokenizer(folder: Path, config: PretrainedConfig) -> PreTrainedTokenizerBase:
    """The tokenizer; transformers answers a missing one with an empty one, which is refused here."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (ValueError, KeyError, OSError) as error:
        raise ConfigError(f"the tokenizer in '{folder}' cannot be used: {_first_line(error)}") from error
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest <= 1:
        raise ConfigError(f"folder '{folder}' has no tokenizer; put the model's own tokenizer files (tokenizer.json ...) there")
    vocabulary_size = config.get_text_config().vocab_size
    if largest >= vocabulary_size:
        sizes = f"ids up to {largest}, the model {vocabulary_size} embeddings"
        raise ConfigError(f"the tokenizer in '{folder}' has {sizes}; use the model's own")
    return tokenizer


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
