"""What measurements get, made from a tiny model."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from heapr.calibration.collector import collect
from heapr.evaluation.measurement import Material
from heapr.model.moe import MoEModel
from heapr.pruning.allocation import allocate
from heapr.pruning.budget import Budget
from heapr.pruning.surgery import remove
from heapr.score.criterion import Criterion, Unit
from heapr.score.gradient import Fisher
from heapr.types import Statistics, TokenWindows
from tests.tiny import no_weights

CPU = torch.device("cpu")


class Source:
    """As much of a model's source as measurements look at before it is loaded."""

    max_sequence_length = None

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer


def only(**given: Any) -> Material:
    """What is given, by name; asking for anything else fails."""

    def refuse() -> Any:
        raise AssertionError("the measurement does not need it")

    names = ("model", "dense_and_pruned", "statistics", "scores", "plan", "tokens")
    values = {name: (lambda name=name: given[name]) if name in given else refuse for name in names}
    return Material(**values, unit=given.get("unit", Unit.NONE), widths=given.get("widths", {}))


def of_model(model: MoEModel, statistics: Statistics | None = None) -> Material:
    """For a measurement of one model."""
    return only(model=model) if statistics is None else only(model=model, statistics=statistics)


def material_of(
    causal_lm: PreTrainedModel, ids_NW: Tensor, *, criterion: Criterion | None = None, ratio: float = 0.4
) -> Material:
    """The steps' results on a tiny model."""
    criterion = criterion or Fisher()
    dense = MoEModel(causal_lm)
    statistics = collect(dense, [ids_NW])
    scores = criterion(statistics, no_weights)
    widths = {layer.index: layer.widths for layer in dense.layers}
    plan = allocate(scores, widths, Budget(ratio=ratio, scope="global", experts_per_token=2))

    def dense_and_pruned() -> tuple[MoEModel, MoEModel]:
        pruned = MoEModel(copy.deepcopy(dense.model))
        remove(pruned, plan)
        return dense, pruned

    return Material(
        model=lambda: dense,
        dense_and_pruned=dense_and_pruned,
        statistics=lambda: statistics,
        scores=lambda: scores,
        plan=lambda: plan,
        tokens=lambda: TokenWindows(ids_NW=ids_NW),
        unit=criterion.unit,
        widths=widths,
    )
