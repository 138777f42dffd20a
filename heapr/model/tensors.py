"""Which tensors in a model's files the model uses, by transformers' own rules and before anything is loaded.

In: a model on the meta device, and the headers of its files. Out: the tensors that it leaves out, or a
refusal of weights that are quantised, do not fit or are incomplete. transformers' own loading runs, on shapes
alone.
"""

from __future__ import annotations

import copy
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, WeightTransform
from transformers.utils import logging as transformers_logging

from heapr.errors import ConfigError
from heapr.model.model_files import Headers

logger = logging.getLogger(__name__)

# By the names that safetensors uses.
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# What quantisation tools put beside a weight, or in its place.
SCALES = re.compile(
    r"((weight|input|output|act|proj|bias|qweight)_scales?(_inv|_2)?|weight_(packed|shape|zero_point|g_idx)|\.(scale|scales|scale_inv)"
    r"|qscale_\w+|qweight|qzeros|g_idx|_blocks|\.SCB|absmax|quant_map|quant_state\.\w+)$"
)
# A decoder layer, or another part of a model.
PLACE = re.compile(r"(\w+\.)?layers\.\d+(?=\.)|model\.\w+(?=\.)|\w+(?=\.)|.+")
BUFFERS = re.compile(r"(inv_freq|position_ids)$")  # stored by older versions of transformers, computed now


@dataclass(frozen=True)
class LeftOut:
    """Tensors in the files that a model does not use.

    Attributes:
        known: tensors that transformers drops on purpose, such as prediction heads and vision towers.
        unknown: all others.
    """

    known: tuple[str, ...]
    unknown: tuple[str, ...]


def check_tensors(model: PreTrainedModel, headers: Headers, folder: Path) -> LeftOut:
    """Return the tensors in a model's files that it leaves out, and refuse weights that do not fit.

    Args:
        model: on the meta device.
        headers: the headers of its files.
        folder: the folder of the files, for messages.

    Raises:
        ConfigError: the weights are quantised, tensors are missing, or shapes differ from the configuration.
    """
    odd = {name: header for name, header in headers.items() if header["dtype"] not in FLOATS}
    if odd and _takes_as_weights(model, odd):
        name = min(odd)
        raise ConfigError(_quantised(folder, f"{name} is {odd[name]['dtype']}"))
    loaded = _load(model, headers)
    scales = [name for name in loaded.left_out.unknown if SCALES.search(name)]
    if scales:
        raise ConfigError(_quantised(folder, f"{scales[0]} belongs to a quantised weight"))
    for problem, names in (("mismatched keys", loaded.mismatched), ("missing keys", loaded.missing)):
        if names:
            what = f"{problem} {names[0]} and {len(names) - 1} more"
            raise ConfigError(f"the weights in '{folder}' do not fit its config.json: {what}; get them again")
    return loaded.left_out


def report_left_out(left_out: LeftOut, model_name: str) -> list[str]:
    """Log one line about tensors dropped on purpose and a warning about unknown ones.

    Returns:
        the lines, for a dry run.
    """
    lines = []
    if left_out.known:
        line = (
            f"{model_name} leaves out what it has no part for: {_summary(left_out.known)}; the pruned model"
            " will not have it"
        )
        logger.info("%-9s %s", "model", line)
        lines.append(line)
    if left_out.unknown:
        line = (
            f"{len(left_out.unknown)} tensors in the files are unknown to {model_name} and not used:"
            f" {_summary(left_out.unknown)}"
        )
        logger.warning("%s", line)
        lines.append(line)
    return lines


def _takes_as_weights(model: PreTrainedModel, odd: Headers) -> bool:
    """Whether any of these tensors of integers or of few bits would become a weight.

    In some families they are tables of numbers instead.
    """
    loaded = _load(model, odd)
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


def _load(model: PreTrainedModel, headers: Headers) -> _Loaded:
    """Let transformers load tensors on the meta device into a model on the meta device."""
    reports: list[Any] = []
    dropped: set[str] = set()
    model_class: Any = type(model)

    def adjust(self: PreTrainedModel, report: Any) -> None:
        before = set(report.unexpected_keys)
        model_class._adjust_missing_and_unexpected_keys(self, report)
        dropped.update(before - set(report.unexpected_keys))
        reports.append(report)

    def load(model: Any, tensors: Any, files: Any, config: Any) -> Any:
        here = replace(config, weight_mapping=without_cpu(config.weight_mapping))
        return model_class._load_pretrained_model(model, tensors, files, here)

    # The same name and module, because transformers finds conversions by them.
    members = {
        "_adjust_missing_and_unexpected_keys": adjust,
        "_load_pretrained_model": staticmethod(load),
        "__module__": model_class.__module__,
    }
    watched: Any = type(model_class.__name__, (model_class,), members)
    tensors = dict(_without_memory(headers))
    try:
        with silent():
            watched.from_pretrained(
                None, config=model.config, state_dict=tensors, device_map="meta", ignore_mismatched_sizes=True
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
        dtype = FLOATS.get(header["dtype"], torch.uint8)
        yield name, torch.empty(header["shape"], dtype=dtype, device="meta")


def _quantised(folder: Path, what: str) -> str:
    return (
        f"the weights in '{folder}' are quantised ({what}), and gradients need them whole; give a bfloat16 or"
        " float32 copy"
    )


def _summary(names: Iterable[str]) -> str:
    """How many tensors there are below each part of a model: the four largest parts."""
    counts: Counter[str] = Counter()
    for name in names:
        match = PLACE.match(name)
        if match:
            counts[match[0]] += 1
    shown = [f"{number} below {place}" for place, number in counts.most_common(4)]
    if len(counts) > 4:
        shown.append(f"and {len(counts) - 4} more places")
    return ", ".join(shown)


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
