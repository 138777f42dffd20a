"""Find, check, identify and load a model and its tokenizer.

In: a built-in name, a local folder or a hub id. Out: `ModelSource` (cheap: no weights are loaded, and none
downloaded) and from it a `MoEModel`. Every mistake that can be seen in configuration and tokenizer is refused
here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import huggingface_hub
import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from heapr.errors import ConfigError, TooLargeError
from heapr.files import user_path
from heapr.hub import hub_is_reachable
from heapr.model.config_file import prediction_heads
from heapr.model.description import CONFIG_FILE, UNUSABLE, read_config, read_tokenizer
from heapr.model.model_files import (
    DESCRIPTION_FILES,
    INDEX,
    WEIGHTS,
    check_weight_files,
    hash_folder,
    read_headers,
    shards_of,
    weight_files,
)
from heapr.model.moe import MoEModel, experts_per_token, find_moe_layers
from heapr.model.tensors import check_tensors, report_left_out
from heapr.words import first_line

BUILTIN_PREFIX = "builtin:"
DTYPES = ("float32", "bfloat16", "float16", "float64")  # in which weights may be
BUILTIN_FOLDER = Path(__file__).parent / "builtin"


@dataclass(frozen=True)
class ModelSource:
    """A model that was found and checked, not yet loaded.

    Attributes:
        folder: local folder with configuration and tokenizer; of a hub model, the cache's.
        identity: what the model is: hub id and commit, or a hash of the folder's content; and the dtype.
        dtype: of the loaded weights.
        config: transformers' configuration.
        architecture: name of the model's class; of a wrapper with vision and the like, that of its language
            model.
        widths: atomic experts of every expert, by decoder layer index.
        atomic_expert_parameters: parameters that go with one atomic expert, by decoder layer index.
        experts_per_token: K.
        trust_remote_code: whether Python files in the folder may run.
    """

    folder: Path
    identity: dict[str, str]
    dtype: torch.dtype
    config: PretrainedConfig
    architecture: str
    widths: Mapping[int, Sequence[int]]
    atomic_expert_parameters: Mapping[int, int]
    experts_per_token: int
    trust_remote_code: bool = False

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's own.

        Raises:
            ConfigError: there is none, or it is another model's.
        """
        return read_tokenizer(self.folder, self.config, self.trust_remote_code)

    @property
    def num_atomic_experts(self) -> int:
        return sum(sum(width_E) for width_E in self.widths.values())

    @property
    def max_sequence_length(self) -> int | None:
        """Most tokens in a sequence, where the configuration names a limit."""
        return getattr(self.config.get_text_config(), "max_position_embeddings", None)

    @property
    def has_weights(self) -> bool:
        """Whether every file of weights is in the folder."""
        names = weight_files(self.folder)
        return bool(names) and all((self.folder / name).is_file() for name in names)

    @cached_property
    def left_out(self) -> list[str]:
        """What of the weights in the folder the model does not take, in lines that were logged. Needs the
        weights' files, loads none.

        Raises:
            ConfigError: they are quantised, or do not fit the configuration.
        """
        model = self.on_meta().model
        return report_left_out(
            check_tensors(model, read_headers(self.folder), self.folder), type(model).__name__
        )

    @property
    def left_behind(self) -> dict[str, str | int]:
        """What the configuration promises and a pruned model will not have: the rest of a wrapper, prediction
        heads."""
        original = next(iter(self.config.architectures or ()), self.architecture)
        heads = prediction_heads(self.config)
        wrapper: dict[str, str | int] = (
            {} if original == self.architecture else {"language_model_of": original}
        )
        return wrapper | ({"prediction_heads_left_out": heads} if heads else {})

    @property
    def num_layers(self) -> int:
        """Decoder layers, with and without experts."""
        return int(self.config.get_text_config().num_hidden_layers)

    def on_meta(self) -> MoEModel:
        """The model without memory, in its dtype: shapes alone."""
        return MoEModel(_on_meta(self.config, str(self.folder), self.trust_remote_code, self.dtype))

    def load(self, device: torch.device, device_map: str | None = None) -> MoEModel:
        """Load the weights; of a hub model, download them first.

        Args:
            device: where they go.
            device_map: spread them over all GPUs instead, as transformers does under this name.

        Raises:
            ConfigError: weights are missing, damaged, too large, or do not fit the configuration.
        """
        self.fetch()
        _ = self.left_out  # refuses what would load as something else
        model = MoEModel(self._load_weights(device if device_map is None else device_map))
        model.check_head()
        return model

    def fetch(self) -> None:
        """Download the weights of a hub model; a local one has them.

        Raises:
            ConfigError: they cannot be downloaded, or are damaged.
        """
        if "hub" in self.identity:
            index = self.folder / INDEX
            _download(
                self.identity["hub"],
                self.identity["commit"],
                [WEIGHTS, *(shards_of(index) if index.is_file() else ())],
            )
        if "hub" in self.identity and not self.has_weights and not hub_is_reachable():
            raise ConfigError(
                f"the weights of model.path='{self.identity['hub']}' are not all in '{self.folder}', and the"
                " hub cannot be reached; download them where there is a network (hf download) or give a"
                " local folder"
            )
        check_weight_files(self.folder)

    def _load_weights(self, placement: torch.device | str) -> PreTrainedModel:
        try:
            with _bar_on_terminals_only():
                model, found = AutoModelForCausalLM.from_pretrained(
                    self.folder,
                    config=self.config,
                    dtype=self.dtype,
                    device_map=placement,
                    trust_remote_code=self.trust_remote_code,
                    local_files_only=True,
                    use_safetensors=True,
                    output_loading_info=True,
                )
        except torch.OutOfMemoryError as error:
            raise TooLargeError(self._too_large()) from error
        except (OSError, RuntimeError, SafetensorError) as error:
            raise ConfigError(
                f"the weights in '{self.folder}' cannot be loaded: {first_line(error)}; get them again"
            ) from error
        for problem in ("missing_keys", "mismatched_keys"):
            if found.get(problem):
                names = sorted(str(name) for name in found[problem])
                what = f"{problem.replace('_', ' ')} {names[0]} and {len(names) - 1} more"
                raise ConfigError(
                    f"the weights in '{self.folder}' do not fit its config.json: {what}; get them again"
                )
        if any(parameter.device.type == "meta" for parameter in model.parameters()):
            raise TooLargeError(self._too_large())
        return model

    def _too_large(self) -> str:
        return (
            f"the weights in '{self.folder}' do not fit into memory as {self.identity['dtype']}; use more or"
            " larger GPUs, or runtime=cpu"
        )


def find_model(
    path: str,
    *,
    dtype: str | None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    digests: Path | None = None,
    config_only: bool = False,
) -> ModelSource:
    """Find a model and check all that can be checked without its weights.

    Args:
        path: "builtin:<name>", a local folder, or a hub id.
        dtype: name of a torch dtype; none is that of the weights, as config.json says.
        revision: branch, tag or commit of a hub id; its commit enters the identity.
        trust_remote_code: whether Python files in the folder may run.
        digests: folder in which hashes of large local weights are remembered.
        config_only: ask for no weights, and of a hub id download no more than its config.json.

    Raises:
        ConfigError: no such model, not a Mixture-of-Experts model, a missing capability, damaged weights.
    """
    folder = _find_folder(
        path, revision, [CONFIG_FILE] if config_only else DESCRIPTION_FILES, has_code=trust_remote_code
    )
    config = read_config(folder, trust_remote_code)
    dtype = dtype or _dtype_of(config, folder)  # now: building a model sets it
    model = _on_meta(config, path, trust_remote_code)
    layers = find_moe_layers(model)
    if _is_on_hub(path):
        identity = {"hub": path, "commit": folder.name}
    else:
        if weight_files(folder) or not config_only:
            check_weight_files(folder)
        identity = {"sha256": hash_folder(folder, digests, has_code=trust_remote_code)}
    return ModelSource(
        folder=folder,
        identity={**identity, "dtype": dtype, **({"remote_code": "trusted"} if trust_remote_code else {})},
        dtype=getattr(torch, dtype),
        config=config,
        architecture=type(model).__name__,
        widths={layer.index: layer.widths for layer in layers},
        atomic_expert_parameters={layer.index: layer.atomic_expert_parameters for layer in layers},
        experts_per_token=experts_per_token(model),
        trust_remote_code=trust_remote_code,
    )


def _find_folder(path: str, revision: str | None, description: list[str], *, has_code: bool) -> Path:
    """Where a model's description is; of a hub model, it is downloaded there."""
    if path.startswith(BUILTIN_PREFIX):
        return _builtin(path.removeprefix(BUILTIN_PREFIX))
    if _is_on_hub(path):
        return _download(path, revision, description + (["*.py"] if has_code else []))
    folder = user_path(path)
    if not folder.is_dir():
        raise ConfigError(
            f"model.path='{path}': no such folder; give a folder with config.json and safetensors, or a hub"
            " id 'owner/name'"
        )
    return folder


def _is_on_hub(path: str) -> bool:
    """Whether it is a hub id, and no folder of that name is here."""
    return (
        path.count("/") == 1
        and not path.startswith((BUILTIN_PREFIX, "/", ".", "~"))
        and not Path(path).is_dir()
    )


def _dtype_of(config: PretrainedConfig, folder: Path) -> str:
    """That of the weights, as the configuration says; float32 if it does not.

    Raises:
        ConfigError: it is one that no gradient goes through.
    """
    dtype = str(config.dtype or config.get_text_config().dtype or torch.float32).removeprefix("torch.")
    if dtype not in DTYPES:
        raise ConfigError(
            f"config.json in '{folder}' says dtype {dtype}; give model.dtype as one of {', '.join(DTYPES)}"
        )
    return dtype


def _builtin(name: str) -> Path:
    known = sorted(entry.name for entry in BUILTIN_FOLDER.iterdir() if entry.is_dir())
    if name not in known:
        raise ConfigError(
            f"model.path='{BUILTIN_PREFIX}{name}': no such built-in model; known:"
            f" {', '.join(BUILTIN_PREFIX + n for n in known)}"
        )
    return BUILTIN_FOLDER / name


def _download(hub_id: str, revision: str | None, patterns: list[str]) -> Path:
    """Folder of a hub model with the wanted files: the hub is asked if it can be reached, else the local
    cache."""
    online = hub_is_reachable()
    try:
        folder = huggingface_hub.snapshot_download(
            hub_id, revision=revision, allow_patterns=patterns, local_files_only=not online
        )
    except LocalEntryNotFoundError:
        raise ConfigError(
            f"model.path='{hub_id}' is neither a local folder nor in the local hub cache, and the hub cannot"
            " be reached; download it where there is a network (hf download) or give a local folder"
        ) from None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ConfigError(f"model.path='{hub_id}' cannot be downloaded: {first_line(error)}") from error
    return Path(folder)


def _on_meta(
    config: PretrainedConfig, path: str, trust_remote_code: bool, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """The model without memory: refuses what has no MoE layer or needs a missing capability."""
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, dtype=dtype, trust_remote_code=trust_remote_code
            )
    except ValueError as error:
        raise ConfigError(
            f"model.path='{path}' is not a causal language model: {first_line(error)}"
        ) from error
    except UNUSABLE as error:
        raise ConfigError(
            f"config.json of model.path='{path}' describes no model: {first_line(error)}; look for a damaged"
            " field"
        ) from error
    return model


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
