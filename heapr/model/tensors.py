"""What a model takes of the tensors in its files, by transformers' own rules and before anything is loaded.

In: a model on the meta device, and the headers of its files. Out: what it leaves out; or a refusal of weights
that are quantised, do not fit or are not all there. transformers' own loading runs, on shapes alone.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from heapr.errors import ConfigError
from heapr.model.model_files import Headers

logger = logging.getLogger(__name__)

# Safetensors' names.
FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
SCALES = re.compile(  # what tools that quantise put beside a weight, or in its place
    r"((weight|input|output|act|proj|bias|qweight)_scales?(_inv|_2)?|weight_(packed|shape|zero_point|g_idx)|\.(scale|scales|scale_inv)"
    r"|qscale_\w+|qweight|qzeros|g_idx|_blocks|\.SCB|absmax|quant_map|quant_state\.\w+)$"
)
# A decoder layer, or a part beside them.
PLACE = re.compile(r"(\w+\.)?layers\.\d+(?=\.)|model\.\w+(?=\.)|\w+(?=\.)|.+")
BUFFERS = re.compile(r"(inv_freq|position_ids)$")  # of older versions of transformers; computed now


@dataclass(frozen=True)
class LeftOut:
    """Tensors in the files that a model does not take.

    Attributes:
        known: those that transformers drops on purpose, such as prediction heads and vision towers.
        unknown: others.
    """

    known: tuple[str, ...]
    unknown: tuple[str, ...]


def check_tensors(model: PreTrainedModel, headers: Headers, folder: Path) -> LeftOut:
    """What of the tensors in a model's files it leaves out.

    Args:
        model: on the meta device.
        headers: of its files.
        folder: where they are, for messages.

    Raises:
        ConfigError: the weights are quantised, or tensors are missing or have other shapes than the
            configuration says.
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
    """One line for what is dropped on purpose, and a warning for what is not known; logged, and returned for
    a dry run."""
    lines = []
    if left_out.known:
        lines.append(
            f"{model_name} leaves out what it has no part for: {_summary(left_out.known)}; the pruned model"
            " will not have it"
        )
        logger.info("%-9s %s", "model", lines[-1])
    if left_out.unknown:
        lines.append(
            f"{len(left_out.unknown)} tensors in the files are unknown to {model_name} and not used:"
            f" {_summary(left_out.unknown)}"
        )
        logger.warning("%s", lines[-1])
    return lines


def _takes_as_weights(model: PreTrainedModel, odd: Headers) -> bool:
    """Whether any of these tensors of whole numbers, or of few bits, would become a weight: some families
    have tables of numbers."""
    kinds = model.state_dict()
    loaded = _load(model, odd)
    return bool(loaded.mismatched) or any(
        kinds[name].is_floating_point() for name in kinds.keys() - set(loaded.missing)
    )


@dataclass(frozen=True)
class _Loaded:
    """Names in the model of what is missing and of what has another shape, and what was left out."""

    missing: list[str]
    mismatched: list[str]
    left_out: LeftOut


def _load(model: PreTrainedModel, headers: Headers) -> _Loaded:
    """Let transformers load tensors without memory into a model without memory."""
    reports: list[Any] = []
    dropped: set[str] = set()
    model_class: Any = type(model)

    def adjust(self: PreTrainedModel, report: Any) -> None:
        before = set(report.unexpected_keys)
        model_class._adjust_missing_and_unexpected_keys(self, report)
        dropped.update(before - set(report.unexpected_keys))
        reports.append(report)

    # name and module, because transformers finds conversions by them
    members = {"_adjust_missing_and_unexpected_keys": adjust, "__module__": model_class.__module__}
    watched: Any = type(model_class.__name__, (model_class,), members)
    tensors = dict(_without_memory(headers))
    try:
        with _silent():
            watched.from_pretrained(
                None, config=model.config, state_dict=tensors, device_map="meta", ignore_mismatched_sizes=True
            )
    except RuntimeError:  # over parts that cannot be put together, which the report names
        if not reports:
            raise
    (report,) = reports
    mismatched = [
        f"{name} of shape {tuple(found)}, not {tuple(wanted)}"
        for name, found, wanted in report.mismatched_keys
    ]
    return _Loaded(
        missing=sorted(report.missing_keys),
        mismatched=sorted(mismatched) + sorted(report.conversion_errors),
        left_out=LeftOut(
            known=tuple(sorted(name for name in dropped if not BUFFERS.search(name))),
            unknown=tuple(sorted(report.unexpected_keys)),
        ),
    )


def _without_memory(headers: Headers) -> Iterator[tuple[str, Tensor]]:
    for name, header in headers.items():
        yield (
            name,
            torch.empty(header["shape"], dtype=FLOATS.get(header["dtype"], torch.uint8), device="meta"),
        )


def _quantised(folder: Path, what: str) -> str:
    return (
        f"the weights in '{folder}' are quantised ({what}), and gradients need them whole; give a bfloat16 or"
        " float32 copy"
    )


def _summary(names: Iterable[str]) -> str:
    """How many tensors there are below each part of a model."""
    counts = Counter(match[0] for name in names if (match := PLACE.match(name)))
    shown = [f"{number} below {place}" for place, number in counts.most_common(4)]
    return ", ".join(shown) + (f", and {len(counts) - 4} more places" if len(counts) > 4 else "")


@contextmanager
def _silent() -> Iterator[None]:
    """transformers' bar and its report of a loading that is none; restores."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
