"""Which tensors in a model's files the model uses, by transformers' own rules and before anything is loaded.

In: a model on the meta device, and the headers of its files. Out: the tensors that it leaves out, or a
refusal of weights that are quantised, do not fit or are incomplete. transformers' own loading runs, on shapes
alone.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightTransform,
)
from transformers.utils import logging as transformers_logging

from heapr.errors import ConfigError
from heapr.model.left_out import LeftOut
from heapr.model.model_files import Headers
from heapr.model.quantised import (
    Quantization,
    check_modules,
    dequantising,
    method_of,
    quantised,
    with_quantization,
)
from heapr.model.shards import DTYPES

# Of weights that are not quantised, by the names that safetensors uses.
FLOATS = ("F64", "F32", "F16", "BF16")
EIGHT_BITS = ("F8_E4M3", "F8_E5M2")
# What quantisation tools put beside a weight, or in its place.
SCALES = re.compile(
    r"((weight|input|output|act|proj|bias|qweight)_scales?(_inv|_2)?"
    r"|weight_(packed|shape|zero_point|g_idx)|\.(scale|scales|scale_inv)"
    r"|qscale_\w+|qweight|qzeros|g_idx|_blocks|\.SCB|absmax|quant_map|quant_state\.\w+)$"
)
# Scales of activations, which whole weights do not need.
ACTIVATION_SCALES = re.compile(r"((input|output|act|activation)_scale|[kqv]_scale)$")
BUFFERS = re.compile(r"(inv_freq|position_ids)$")  # stored by older versions of transformers, computed now


def check_tensors(
    model: PreTrainedModel, headers: Headers, folder: Path, quantization: Quantization | None = None
) -> LeftOut:
    """Return the tensors in a model's files that it leaves out, and refuse weights that do not fit.

    Args:
        model: on the meta device.
        headers: the headers of its files.
        folder: the folder of the files, for messages.
        quantization: how the weights are quantised, from config.json.

    Raises:
        ConfigError: the weights are quantised in a way that config.json does not say, tensors are missing, or
            shapes differ from the configuration.
    """
    odd = {name: header for name, header in headers.items() if header["dtype"] not in FLOATS}
    if quantization is None and odd and _takes_as_weights(model, odd):
        name = min(odd)
        raise ConfigError(_quantised(folder, f"{name} is {odd[name]['dtype']}"))
    check_modules(model, quantization, folder)
    loaded = _load(model, headers, quantization)
    _check_scales(loaded.left_out, headers, folder, quantization)
    for problem, names in (("mismatched keys", loaded.mismatched), ("missing keys", loaded.missing)):
        if names:
            what = f"{problem} {names[0]} and {len(names) - 1} more"
            raise ConfigError(f"the weights in '{folder}' do not fit its config.json: {what}; get them again")
    return loaded.left_out


def _check_scales(
    left_out: LeftOut, headers: Headers, folder: Path, quantization: Quantization | None
) -> None:
    """Refuse scales without a weight, and weights of 8 bits without a scale, which would be wrong numbers.

    Raises:
        ConfigError: there is one.
    """
    scales = [name for name in left_out.unknown if SCALES.search(name)]
    if quantization is None:
        if scales:
            raise ConfigError(_quantised(folder, f"{scales[0]} belongs to a quantised weight"))
        return
    method = method_of(quantization)
    unused = [name for name in scales if not ACTIVATION_SCALES.search(name)]
    if unused:
        raise ConfigError(
            f"{quantised(folder, method)}, and transformers does not use {unused[0]} to dequantise them; give"
            " a bfloat16 or float32 copy"
        )
    not_loaded = {*left_out.known, *left_out.unknown}
    for name, header in headers.items():
        is_weight = header["dtype"] in EIGHT_BITS and name not in not_loaded and not SCALES.search(name)
        if is_weight and headers.keys().isdisjoint(_names_of_scale(name)):
            raise ConfigError(f"{quantised(folder, method)}, and {name} has no scale; get the files again")


def _names_of_scale(weight: str) -> set[str]:
    """Under which names the scale of a weight may be in the files."""
    stem = weight.removesuffix("weight")
    return {f"{weight}_scale_inv", f"{weight}_scale", f"{stem}scale", f"{stem}qscale_weight"}


def _takes_as_weights(model: PreTrainedModel, odd: Headers) -> bool:
    """Whether any of these tensors of integers or of few bits would become a weight.

    In some families they are tables of numbers instead.
    """
    loaded = _load(model, odd, None)
    if loaded.mismatched:
        return True
    tensors = model.state_dict()
    taken = tensors.keys() - set(loaded.missing)
    return any(tensors[name].is_floating_point() for name in taken)


@dataclass(frozen=True)
class _Loaded:
    """Names of the model's tensors that are missing or have another shape, and what was left out."""

    missing: list[str]
    mismatched: list[str]
    left_out: LeftOut


def _load(model: PreTrainedModel, headers: Headers, quantization: Quantization | None) -> _Loaded:
    """Let transformers load tensors on the meta device into a model on the meta device."""
    reports: list[Any] = []
    dropped: set[str] = set()
    model_class: Any = type(model)

    def adjust(self: PreTrainedModel, report: Any) -> None:
        before = set(report.unexpected_keys)
        model_class._adjust_missing_and_unexpected_keys(self, report)
        dropped.update(before - set(report.unexpected_keys))
        reports.append(report)

    def load(model: Any, tensors: Any, files: Any, how: Any) -> Any:
        here = replace(how, weight_mapping=without_cpu(how.weight_mapping))
        return model_class._load_pretrained_model(model, tensors, files, here)

    # The same name and module, because transformers finds conversions by them.
    members = {
        "_adjust_missing_and_unexpected_keys": adjust,
        "_load_pretrained_model": staticmethod(load),
        "__module__": model_class.__module__,
    }
    watched: Any = type(model_class.__name__, (model_class,), members)
    tensors = dict(_without_memory(headers))
    config = with_quantization(model.config, quantization)
    try:
        with silent(), dequantising():
            watched.from_pretrained(
                None, config=config, state_dict=tensors, device_map="meta", ignore_mismatched_sizes=True
            )
    except RuntimeError:
        # Raised over parts that cannot be put together, which the report names.
        if not reports:
            raise
    (report,) = reports
    return _found(report, dropped)


def _found(report: Any, dropped: Iterable[str]) -> _Loaded:
    """What transformers reports about loading, in order."""
    mismatched = []
    for name, found, wanted in report.mismatched_keys:
        mismatched.append(f"{name} of shape {tuple(found)}, not {tuple(wanted)}")
    known = sorted(name for name in dropped if not BUFFERS.search(name))
    unknown = sorted(report.unexpected_keys)
    return _Loaded(
        missing=sorted(report.missing_keys),
        mismatched=sorted(mismatched) + sorted(report.conversion_errors),
        left_out=LeftOut(tuple(known), tuple(unknown)),
    )


def without_cpu(conversions: Sequence[WeightTransform]) -> list[WeightTransform]:
    """Conversions of which none goes through the CPU, where tensors on the meta device cannot go;
    transformers sends very large ones there."""
    copies = copy.deepcopy(list(conversions))
    for conversion in copies:
        if isinstance(conversion, WeightConverter):
            conversion.force_cpu = False
    return copies


def merges_experts(converter: WeightConverter) -> bool:
    """Whether a conversion stacks single experts' matrices: [W_gate; W_up] of each, or one matrix of each."""
    kinds = []
    for operation in converter.operations:
        dim = getattr(operation, "dim", None)
        kinds.append((type(operation), dim))
    stack = (MergeModulelist, 0)
    join = (Concatenate, 1)
    is_single = len(converter.source_patterns) == 1
    return kinds == [stack, join] or (is_single and kinds == [stack])


def _without_memory(headers: Headers) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors on the meta device, as the headers describe them."""
    for name, header in headers.items():
        dtype = DTYPES.get(header["dtype"], torch.uint8)
        yield name, torch.empty(header["shape"], dtype=dtype, device="meta")


def _quantised(folder: Path, what: str) -> str:
    return (
        f"{quantised(folder, what)}, config.json has no quantization_config that says how, and gradients need"
        " them whole; give a bfloat16 or float32 copy"
    )


@contextmanager
def silent() -> Iterator[None]:
    """Inside the context, hide transformers' progress bar and loading report; settings are restored."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
