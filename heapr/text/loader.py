"""Batches as data loaders give them, without their padding.

In: token ids, or mappings with `input_ids` and perhaps `attention_mask` and `labels`. Out: `Batch`es of
sequences of one length each. So no model sees padding, and no statistic, loss or repair counts it, in every
family and on whichever side it was.
Shape letters: N sequences, W tokens of a sequence with its padding, n without.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby, islice
from typing import Any

import torch
from torch import Tensor

from heapr.errors import ConfigError
from heapr.types import Batch

logger = logging.getLogger(__name__)

IDS, MASK, LABELS = "input_ids", "attention_mask", "labels"
WITHOUT_INFLUENCE = {"token_type_ids", "special_tokens_mask"}  # what tokenizers add and no such model reads

Row = tuple[Tensor, Tensor]  # ids and labels of one sequence (n,), int64


def read_batches(
    loader: Iterable[Any], *, num_tokens: int, limit: int | None = None, batch_size: int | None = None
) -> list[Batch]:
    """All sequences of a loader, those of one length together.

    If all have one length, the batches are those of the loader.

    Args:
        loader: gives token ids (N, W), or mappings with `input_ids`, `attention_mask` (1 for a token, 0 for
            padding before or behind the tokens) and `labels` (-100 where nothing is predicted).
        num_tokens: of the model's vocabulary.
        limit: number of sequences after which reading stops. None reads all.
        batch_size: the most sequences of a batch. None takes the largest number in a batch of the loader.

    Raises:
        ConfigError: a batch is none of this, or no sequence has two tokens.
    """
    sizes: list[int] = []

    def read() -> Iterator[Row]:
        for number, item in enumerate(loader):
            of_batch = _rows(item, f"batch {number}", num_tokens)
            sizes.append(len(of_batch))
            yield from of_batch

    rows = list(islice(read(), limit))
    usable = [row for row in rows if len(row[0]) > 1]
    if not usable:
        raise ConfigError(
            f"the batches hold {len(rows)} sequences, and none has two tokens; give sequences of token ids"
        )
    if len(usable) < len(rows):
        num_dropped = len(rows) - len(usable)
        logger.warning("%d sequences of fewer than two tokens are left out", num_dropped)
    # Stable, so that sequences of one length stay in the loader's order.
    usable.sort(key=_length)
    batches: list[Batch] = []
    for _, group in groupby(usable, key=_length):
        batches += _stacked(list(group), batch_size or max(sizes))
    if all(int(batch.num_predicted.sum()) == 0 for batch in batches):
        raise ConfigError("labels predict no token (all are -100); give labels, or leave them out")
    return batches


def check_ids(ids: Tensor, num_tokens: int, where: str) -> None:
    """Refuse token ids that the model has no embedding for.

    Raises:
        ConfigError: there is one.
    """
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < num_tokens:
        raise ConfigError(
            f"{where} has token ids from {int(ids.min())} to {int(ids.max())}, and the model has embeddings"
            f" 0 to {num_tokens - 1}; use the model's own tokenizer"
        )


def _stacked(rows: list[Row], size: int) -> Iterator[Batch]:
    """Sequences of one length in batches."""
    for start in range(0, len(rows), size):
        ids, labels = zip(*rows[start : start + size], strict=True)
        ids_NW = torch.stack(ids)
        labels_NW = torch.stack(labels)
        are_all_predicted = torch.equal(ids_NW, labels_NW)
        yield Batch(ids_NW, ids_NW if are_all_predicted else labels_NW)


def _rows(item: Any, where: str, num_tokens: int) -> list[Row]:
    """The sequences of one of the loader's batches."""
    fields = dict(item) if isinstance(item, Mapping) else {IDS: item}
    if IDS not in fields:
        keys = ", ".join(map(str, fields)) or "nothing"
        raise ConfigError(
            f"{where} has {keys} and no input_ids; give token ids, or texts as a list of strings"
        )
    unknown = sorted(fields.keys() - {IDS, MASK, LABELS} - WITHOUT_INFLUENCE)
    if unknown:
        raise ConfigError(
            f"{where} has {', '.join(unknown)}, which heapr cannot take; give input_ids, attention_mask and"
            " labels"
        )
    ids_NW = _matrix(fields[IDS], f"{where}: input_ids")
    labels_NW, mask_NW = ids_NW, None
    if fields.get(LABELS) is not None:
        labels_NW = _like(ids_NW, fields[LABELS], f"{where}: labels")
    if fields.get(MASK) is not None:
        mask_NW = _like(ids_NW, fields[MASK], f"{where}: attention_mask")
    rows = []
    for number in range(len(ids_NW)):
        own = slice(None) if mask_NW is None else _unpadded(mask_NW[number], f"{where}, sequence {number}")
        check_ids(ids_NW[number, own], num_tokens, where)
        rows.append((ids_NW[number, own], labels_NW[number, own]))
    return rows


def _matrix(value: Any, what: str) -> Tensor:
    """Whole numbers (N, W) on the CPU, int64."""
    try:
        matrix_NW = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"{what} is a {type(value).__name__} that is no matrix of whole numbers; give token ids (N, W) of"
            " one length, with padding and an attention_mask if need be"
        ) from error
    if matrix_NW.dim() != 2 or matrix_NW.is_floating_point() or matrix_NW.is_complex():
        raise ConfigError(
            f"{what} has shape {tuple(matrix_NW.shape)} and dtype {matrix_NW.dtype}; give whole numbers of"
            " shape (sequences, tokens)"
        )
    return matrix_NW.detach().to("cpu", torch.int64)


def _like(ids_NW: Tensor, value: Any, what: str) -> Tensor:
    """A matrix of the shape of the token ids."""
    matrix_NW = _matrix(value, what)
    if matrix_NW.shape != ids_NW.shape:
        raise ConfigError(
            f"{what} has shape {tuple(matrix_NW.shape)}, and input_ids {tuple(ids_NW.shape)}; give one for"
            " every token"
        )
    return matrix_NW


def _unpadded(mask_W: Tensor, where: str) -> slice:
    """Where the tokens of a padded sequence are."""
    place_n = mask_W.nonzero().flatten().tolist()
    if not place_n:
        return slice(0, 0)
    own = slice(place_n[0], place_n[-1] + 1)
    if len(place_n) < own.stop - own.start:
        raise ConfigError(
            f"{where}: attention_mask leaves out tokens between others; only padding before or behind a"
            " sequence can be left out"
        )
    return own


def _length(row: Row) -> int:
    return len(row[0])
