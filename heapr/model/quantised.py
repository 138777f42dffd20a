"""Quantised weights, which are dequantised as they are loaded, because gradients need them whole.

In: the `quantization_config` of a model's folder. Out: transformers' quantizer, told to dequantise, or a
refusal where transformers cannot.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightTransform
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, AutoHfQuantizer
from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION, HfQuantizer
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

from heapr.errors import ConfigError
from heapr.words import first_line

Quantization = dict[str, Any]  # a `quantization_config` of config.json

FIELD = "quantization_config"
EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2)
DEQUANTIZE = "dequantize"  # transformers' name of the option, and of the operation
# What transformers raises for a quantization_config that it cannot use.
UNUSABLE = (ValueError, TypeError, KeyError, AttributeError, RuntimeError)


def read_quantization(folder: Path) -> Quantization | None:
    """What config.json says about how the weights are quantised, of the model or of a part of it.

    Raises:
        ConfigError: transformers cannot dequantise such weights.
    """
    fields = json.loads((folder / "config.json").read_text())
    parts = [fields, *(part for name, part in fields.items() if name.endswith("_config"))]
    found = [part[FIELD] for part in parts if isinstance(part, dict) and part.get(FIELD) is not None]
    if not found:
        return None
    if not found[0]:
        raise ConfigError(f"config.json in '{folder}' has an empty {FIELD}; remove this field")
    quantization: Quantization = dict(found[0])
    _check(quantization, folder)
    return quantization


def method_of(quantization: Quantization) -> str:
    """Name of the method, such as fp8."""
    return str(quantization.get("quant_method", "unknown"))


def without_quantization(config: PretrainedConfig) -> PretrainedConfig:
    """The configuration, in place, without the field that says how the weights are quantised."""
    for each in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        if each is not None:
            vars(each).pop(FIELD, None)
    return config


def with_quantization(config: PretrainedConfig, quantization: Quantization | None) -> PretrainedConfig:
    """A copy of a configuration with which `from_pretrained`, inside `dequantising`, dequantises."""
    copied = copy.deepcopy(config)
    if quantization is not None:
        copied.quantization_config = {**quantization, DEQUANTIZE: True}
    return copied


def conversions_of(
    model: PreTrainedModel, quantization: Quantization | None
) -> tuple[list[WeightTransform], HfQuantizer | None]:
    """How the tensors of files become those of a model, and the quantizer that takes part in it.

    Args:
        model: on the meta device.
    """
    if quantization is None:
        return get_model_conversion_mapping(model), None
    quantizer = _quantizer(quantization)
    return get_model_conversion_mapping(model, None, quantizer), quantizer


def check_modules(model: PreTrainedModel, quantization: Quantization | None, folder: Path) -> None:
    """Refuse models whose experts transformers replaces, in order to load their quantised weights.

    Raises:
        ConfigError: this model is one of them.
    """
    if quantization is None:
        return
    method = method_of(quantization)
    for module in model.modules():
        replaced = MODULES_TO_PATCH_FOR_QUANTIZATION.get(type(module).__name__, {})
        if method in replaced.get("quantization_methods", ()):
            raise ConfigError(
                f"{quantised(folder, method)}, and transformers loads such {type(module).__name__} as"
                " single modules only; give a bfloat16 or float32 copy"
            )


@contextmanager
def dequantising() -> Iterator[None]:
    """Inside the context, transformers dequantises fp8 weights whose last blocks are not full, too."""
    before = dict(AUTO_QUANTIZER_MAPPING)
    for method, quantizer in before.items():
        if quantizer is FineGrainedFP8HfQuantizer:
            AUTO_QUANTIZER_MAPPING[method] = _Fp8Quantizer
    try:
        yield
    finally:
        AUTO_QUANTIZER_MAPPING.update(before)


def forget_conversions(model: PreTrainedModel, quantization: Quantization | None) -> None:
    """Make a model write its weights as they are now; transformers would quantise them again."""
    if quantization is not None:
        vars(model).pop("_weight_conversions", None)


def quantised(folder: Path, what: str) -> str:
    """The beginning of a message."""
    return f"the weights in '{folder}' are quantised ({what})"


def _quantizer(quantization: Mapping[str, Any]) -> HfQuantizer:
    with dequantising():
        quantizer = AutoHfQuantizer.from_config({**quantization, DEQUANTIZE: True}, pre_quantized=True)
    quantizer.validate_environment(device_map=None)
    return quantizer


def _check(quantization: Quantization, folder: Path) -> None:
    """Refuse what transformers cannot dequantise, as far as it can be told without the model.

    Raises:
        ConfigError: it cannot; or it needs a package.
    """
    method = method_of(quantization)
    quantizer_class = AUTO_QUANTIZER_MAPPING.get(method, HfQuantizer)
    why = None
    try:
        can = DEQUANTIZE in quantizer_class.get_load_operations(None)
    except AttributeError:  # it asks for more than the method's name
        can = False
    if not can:
        why = "which transformers cannot dequantise; give a bfloat16 or float32 copy"
    else:
        try:
            _quantizer(quantization)
        except ImportError as error:
            name = getattr(error, "name", None) or first_line(error)
            why = (
                f"and dequantising them needs a package that is not installed: {str(name).replace('_', '-')}"
            )
            why += "; install it, or give a bfloat16 or float32 copy"
        except UNUSABLE as error:
            why = f"and its {FIELD} cannot be used: {first_line(error)}; give a bfloat16 or float32 copy"
    if why is not None:
        raise ConfigError(f"{quantised(folder, method)}, {why}")


class _Dequantize(Fp8Dequantize):  # type: ignore[misc]
    """transformers' own, which takes the size of blocks from the number of scales, and so needs full blocks.

    DeepSeek-V3's 576 rows have 5 scales for blocks of 128: they are filled up with zeros, which are then cut
    off. What was not quantised gets the model's dtype, as in unquantised models.
    """

    def convert(
        self,
        input_dict: dict[str, Any],
        full_layer_name: str | None = None,
        model: torch.nn.Module | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        found = super().convert(input_dict, full_layer_name=full_layer_name, model=model, **kwargs)
        dtype = self._get_target_dtype(model, full_layer_name)
        if isinstance(model, PreTrainedModel) and dtype is not None:
            for part, dtype_of_part in model._get_dtype_plan(model.dtype).items():
                if re.search(part.replace("*", ".*"), str(full_layer_name)):
                    dtype = dtype_of_part
        return {name: _cast(value, dtype) for name, value in found.items()}

    def _dequantize_one(
        self, quantized: Tensor, scales: Tensor, output_dtype: torch.dtype | None = None
    ) -> Tensor:
        block = self.hf_quantizer.quantization_config.weight_block_size
        if block is None or scales.dim() < 2 or quantized.dtype not in EIGHT_BITS:
            whole: Tensor = super()._dequantize_one(quantized, scales, output_dtype)
            return whole
        rows, columns = quantized.shape[-2:]
        num_down, num_across = scales.shape[-2:]
        missing_rows = _missing(rows, block[0], num_down)
        missing_columns = _missing(columns, block[1], num_across)
        filled = F.pad(quantized.to(torch.float32), (0, missing_columns, 0, missing_rows))
        whole = super()._dequantize_one(filled, scales, output_dtype)
        return whole[..., :rows, :columns].contiguous()


def _cast(value: Tensor | list[Tensor], dtype: torch.dtype | None) -> Tensor | list[Tensor]:
    if isinstance(value, list):
        return [tensor.to(dtype=dtype) for tensor in value]
    return value.to(dtype=dtype)


def _missing(length: int, block: int, num_blocks: int) -> int:
    """How much the last of several blocks lacks; 0 if there are other blocks than the configuration says."""
    if num_blocks != -(-length // block):
        return 0
    return num_blocks * block - length


class _Fp8Quantizer(FineGrainedFP8HfQuantizer):  # type: ignore[misc]
    def get_load_operations(self) -> dict[str, Any]:
        return {DEQUANTIZE: _Dequantize}
