"""What a model's files and a pruned checkpoint do not have in common, as lines to read.

In: tensors that a model does not use, or parts of it that pruning does not touch. Out: one line each, for the
log, the dry run and the card.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from transformers import PreTrainedModel
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from heapr.model.model_files import Headers
from heapr.model.quantised import Quantization, conversions_of

logger = logging.getLogger(__name__)

# A decoder layer, or another part of a model.
PLACE = re.compile(r"(\w+\.)?layers\.\d+(?=\.)|model\.\w+(?=\.)|\w+(?=\.)|.+")


@dataclass(frozen=True)
class LeftOut:
    """Tensors in the files that a model does not use.

    Attributes:
        known: tensors that transformers drops on purpose, such as prediction heads and vision towers.
        unknown: all others.
    """

    known: tuple[str, ...]
    unknown: tuple[str, ...]


def report_left_out(left_out: LeftOut, model_name: str) -> list[str]:
    """Log one line about tensors dropped on purpose and a warning about unknown ones.

    Returns:
        the lines, for a dry run.
    """
    lines = []
    if left_out.known:
        line = f"{model_name} leaves out what it has no part for: {summary(left_out.known)}"
        logger.info("%-9s %s", "model", line)
        lines.append(line)
    if left_out.unknown:
        line = (
            f"{len(left_out.unknown)} tensors in the files are unknown to {model_name} and not used:"
            f" {summary(left_out.unknown)}"
        )
        logger.warning("%s", line)
        lines.append(line)
    return lines


def names_in_files(
    model: PreTrainedModel, headers: Headers, names: Iterable[str], quantization: Quantization | None
) -> Iterator[str]:
    """The tensors in the files that transformers' conversion, which may merge several into one, makes into
    tensors of these names.

    Args:
        model: on the meta device.
        headers: the headers of its files.
    """
    wanted = set(names)
    conversions, _ = conversions_of(model, quantization)
    renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
    converters = [each for each in conversions if isinstance(each, WeightConverter)]
    known = model.state_dict()
    for name in sorted(headers, key=dot_natural_key):
        target, _ = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        if target in wanted:
            yield name


def carried_over(model: PreTrainedModel, layers: str) -> list[str]:
    """One line about what a wrapper has beside its text decoder, none if that is nothing.

    Args:
        layers: name of the list of decoder layers in the model.
    """
    decoder = layers.rpartition(".")[0]
    head = model.get_output_embeddings()
    heads = {id(parameter) for parameter in head.parameters()} if head is not None else set()
    beside = []
    for name, parameter in model.named_parameters():
        if not name.startswith(f"{decoder}.") and id(parameter) not in heads:
            beside.append(name)
    if not beside:
        return []
    return [
        f"only the text decoder of {type(model).__name__} is pruned; {summary(beside)} are carried over"
        " unchanged"
    ]


def summary(names: Iterable[str]) -> str:
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
