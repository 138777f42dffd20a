"""What comparisons get, made from a tiny model."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from heapr.calibration.collector import collect
from heapr.evaluation.evaluator import Material
from heapr.model.moe import MoEModel
from heapr.pruning.allocation import allocate
from heapr.pruning.budget import Budget
from heapr.pruning.surgery import remove
from heapr.score.criterion import Criterion
from heapr.score.gradient import Fisher
from heapr.types import Plan, TokenWindows
from tests.tiny import no_weights


def material_of(causal_lm: PreTrainedModel, ids_NW: Tensor, *, criterion: Criterion | None = None, ratio: float = 0.4) -> Material:
    """The stages' results on a tiny model."""
    criterion = criterion or Fisher()
    dense = MoEModel(causal_lm)
    statistics = collect(dense, [ids_NW])
    scores = criterion(statistics, no_weights)
    widths = {layer.index: layer.widths for layer in dense.layers}
    plan = allocate(scores, widths, Budget(ratio=ratio, scope="global", experts_per_token=2))
    return Material(
        statistics=statistics,
        scores=scores,
        unit=criterion.unit,
        widths=widths,
        plan=plan,
        tokens=lambda: TokenWindows(ids_NW=ids_NW),
        dense=lambda: dense,
        dense_and_pruned=_both(dense, plan),
    )


def _both(dense: MoEModel, plan: Plan) -> Callable[[], tuple[MoEModel, MoEModel]]:
    def both() -> tuple[MoEModel, MoEModel]:
        pruned = MoEModel(copy.deepcopy(dense.model))
        remove(pruned, plan)
        return dense, pruned

    return both


CPU = torch.device("cpu")
