"""A model that was found (heapr/model/find_model.py), and how it is loaded: as a whole, or layer by layer.

In: a folder with configuration, tokenizer and weights. Out: a `MoEModel`. Weights that are missing, damaged
or not the configuration's are refused.
"""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from heapr.errors import ConfigError, TooLargeError
from heapr.hub import hub_is_reachable
from heapr.model.auto_class import CAUSAL_LM, auto_class, auto_class_name
from heapr.model.config_file import prediction_heads
from heapr.model.description import UNUSABLE, read_tokenizer
from heapr.model.find_folder import download
from heapr.model.heap import give_back_freed_memory
from heapr.model.kernels import keep_few_kernels
from heapr.model.left_out import LeftOut, carried_over, names_in_files, report_left_out
from heapr.model.model_files import (
    INDEX,
    WEIGHTS,
    check_weight_files,
    read_headers,
    shards_of,
    weight_files,
)
from heapr.model.model_shape import ModelShape
from heapr.model.moe import OTHER_PARTS, MoEModel, layers_name_of
from heapr.model.quantised import (
    Quantization,
    dequantising,
    forget_conversions,
    method_of,
    with_quantization,
)
from heapr.model.residency import Streamed
from heapr.model.tensors import check_tensors
from heapr.model.weights import LayerWeights
from heapr.words import first_line

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelSource(ModelShape):
    """A model that was found and checked but not loaded yet.

    Attributes:
        folder: local folder with configuration and tokenizer; for a hub model, its folder in the cache.
        identity: identifies the model: hub id and commit, or a hash of the folder's content; and the dtype.
        stored_dtype: of the files, as config.json says; None if it does not.
        architecture: name of the model's class.
        trust_remote_code: whether Python files in the folder may run.
        quantization: how the weights in the files are quantised; None if they are not.
    """

    folder: Path
    identity: dict[str, str]
    stored_dtype: torch.dtype | None
    architecture: str
    trust_remote_code: bool = False
    quantization: Quantization | None = None

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's own tokenizer.

        Raises:
            ConfigError: there is none, or it belongs to another model.
        """
        return read_tokenizer(self.folder, self.config, self.trust_remote_code)

    @property
    def has_weights(self) -> bool:
        """Whether all weight files are in the folder."""
        names = weight_files(self.folder)
        return bool(names) and all((self.folder / name).is_file() for name in names)

    @property
    def on_quantization(self) -> list[str]:
        """One line if the weights are quantised, else none."""
        if self.quantization is None:
            return []
        return [
            f"the weights are quantised ({method_of(self.quantization)}): they are dequantised to"
            f" {self.identity['dtype']} as they are loaded, and the pruned model is written in it"
        ]

    @cached_property
    def remarks(self) -> list[str]:
        """What there is to say about the tensors in the folder, as the lines that were logged: that they are
        quantised, and which of them the model does not use.

        Needs the weight files, but loads no weights.

        Raises:
            ConfigError: the weights cannot be dequantised, or do not fit the configuration.
        """
        left_out = self._left_out
        model = self.on_meta().model
        lines = self.on_quantization
        if self._is_wrapper:
            lines += carried_over(model, layers_name_of(model))
        for line in lines:
            logger.info("%-9s %s", "model", line)
        return lines + report_left_out(left_out, type(model).__name__)

    @cached_property
    def heads(self) -> tuple[str, ...]:
        """The tensors in the folder of heads that predict further tokens; no model computes with them."""
        if not prediction_heads(self.config):
            return ()
        known = [name for name in self._left_out.known if not OTHER_PARTS.search(name)]
        model, headers = self.on_meta().model, read_headers(self.folder)
        return tuple(names_in_files(model, headers, known, self.quantization))

    @cached_property
    def _left_out(self) -> LeftOut:
        return check_tensors(self.on_meta().model, read_headers(self.folder), self.folder, self.quantization)

    @property
    def left_behind(self) -> dict[str, str]:
        """What a pruned model loses of its configuration: the rest of a wrapper, and quantisation; or which
        wrapper it is the text decoder of."""
        left_behind: dict[str, str] = {}
        if self._is_wrapper and auto_class_name(self.config) == CAUSAL_LM:
            left_behind["language_model_of"] = type(self.config).__name__.removesuffix("Config")
        elif self._is_wrapper:
            left_behind["text_decoder_of"] = self.architecture
        if self.quantization is not None:
            left_behind["dequantised_from"] = method_of(self.quantization)
        return left_behind

    @property
    def _is_wrapper(self) -> bool:
        """Whether the configuration is one of a language model together with other models."""
        return self.config.get_text_config() is not self.config

    @property
    def num_layers(self) -> int:
        """Number of decoder layers, with and without experts."""
        return int(self.config.get_text_config().num_hidden_layers)

    def on_meta(self) -> MoEModel:
        """The model on the meta device, in its dtype: shapes, no memory."""
        config = copy.deepcopy(self.config)  # some forms change their model's
        return MoEModel(on_meta(config, str(self.folder), self.trust_remote_code, self.dtype))

    def load(self, device: torch.device, device_map: str | None = None) -> MoEModel:
        """Load the weights; those of a hub model are downloaded first.

        Args:
            device: where the weights go.
            device_map: spread them over all GPUs instead; a device map of transformers.

        Raises:
            ConfigError: weights are missing, damaged, too large, or do not fit the configuration.
        """
        self.fetch()
        _ = self.remarks  # refuses weights that would silently load as something else
        placement = device if device_map is None else device_map
        model = MoEModel(self._load_weights(placement))
        model.check_head()
        return model

    def stream(
        self, device: torch.device, *, tapes: Path | None = None, read_ahead: bool = False
    ) -> MoEModel:
        """The model with one decoder layer in memory at a time.

        Args:
            device: where a layer goes.
            tapes: folder for what layers put out while they are not in memory; None leaves it in the CPU's
                memory.
            read_ahead: read the next layer in a thread while one computes; the CPU's memory holds it too.

        Raises:
            ConfigError: see `load`; or a layer's weights cannot be read by themselves.
        """
        self.fetch()
        _ = self.remarks
        give_back_freed_memory()
        keep_few_kernels()
        model = self.on_meta()
        weights = LayerWeights(
            model.model,
            model.layers_name,
            self.folder,
            device,
            quantization=self.quantization,
            read_ahead=read_ahead,
        )
        return MoEModel(model.model, Streamed(model.decoder_layers, model.layers, weights, tapes))

    def fetch(self) -> None:
        """Download the weights of a hub model, and check the weight files of any model.

        Raises:
            ConfigError: the weights cannot be downloaded, or are missing or damaged.
        """
        hub_id = self.identity.get("hub")
        if hub_id is not None:
            index = self.folder / INDEX
            shards = shards_of(index) if index.is_file() else ()
            download(hub_id, self.identity["commit"], [WEIGHTS, *shards])
            if not self.has_weights and not hub_is_reachable():
                raise ConfigError(
                    f"the weights of model.path='{hub_id}' are not all in '{self.folder}', and the hub cannot"
                    " be reached; download them where there is a network (hf download) or give a local folder"
                )
        check_weight_files(self.folder)

    def _load_weights(self, placement: torch.device | str) -> PreTrainedModel:
        try:
            with _bar_on_terminals_only(), dequantising():
                model, found = auto_class(self.config).from_pretrained(
                    self.folder,
                    config=with_quantization(self.config, self.quantization),
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
        forget_conversions(model, self.quantization)
        return model

    def _too_large(self) -> str:
        return (
            f"the weights in '{self.folder}' do not fit into memory as {self.identity['dtype']}; use more or"
            " larger GPUs, or runtime=cpu"
        )


def on_meta(
    config: PretrainedConfig, path: str, trust_remote_code: bool, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """The model of a configuration on the meta device.

    Raises:
        ConfigError: the configuration describes no causal language model.
    """
    try:
        with torch.device("meta"):
            model: PreTrainedModel = auto_class(config).from_config(
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
    """Inside the context, transformers' progress bar is shown only on a terminal; it clutters log files."""
    shown = transformers_logging.is_progress_bar_enabled()
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
