"""Scores against truth: compares the predicted with the measured increase of the loss.

In: the dense model, scores and calibration tokens. Out: the correlation of predicted and measured increase
over groups of atomic experts; both values for every group are in `details.json`. The plan plays no part, so
it is computed once per score.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Annotated, Any

import torch
from annotated_types import Ge
from torch import Tensor

from heapr.errors import ConfigError
from heapr.evaluation.correlation import pearson, spearman
from heapr.evaluation.measurement import Material, Need
from heapr.model.experts.dispatch import use_comparable_experts
from heapr.model.load import ModelSource
from heapr.model.loss import next_token_loss
from heapr.model.moe import MoEModel
from heapr.model.passes import Variant, final_hidden_states, unchanged
from heapr.model.span import Span
from heapr.progress import progress
from heapr.pruning.masking import masked
from heapr.ranks import Ranks
from heapr.score.criterion import predicted_increase
from heapr.text.windows import batches
from heapr.types import Evaluation, Metrics, Scores, TokenWindows


@dataclass(frozen=True)
class Group:
    """Atomic experts of one score quantile.

    Attributes:
        size: number of atomic experts in the quantile.
        removed: flat positions (layer, expert, atomic expert) of those that are removed together.
    """

    size: int
    removed: Tensor


class Truth:
    """Removes groups of atomic experts and compares the increase of the loss with what the scores predict.

    All atomic experts of all layers are ranked by score and cut into groups of equal size (to within one).
    For each group, a seeded random sample is removed, alone, and the mean next-token loss is measured on the
    calibration sequences, from which the scores were also computed.

    The prediction for a group is the sum over the removed atomic experts, which ignores interactions. It is
    in nats if the criterion has a unit (`heapr_sum` and `fisher` as they are, `heapr` times n/N,
    docs/method.md (7)). Otherwise it is the plain sum of scores, and only its order is meaningful.

    Predictions in nats are too low: those of `fisher` are about half of the measured values in the highest
    decile (built-in model), even if atomic experts are removed one at a time. Squared gradients underestimate
    the curvature, and the first-order term is left out (docs/method.md, Evaluation). Trust ranks more than
    values.

    Metrics:

    - `truth/spearman`: rank correlation of prediction and measured increase over the groups.
    - `truth/pearson`: correlation of the values, for criteria with a unit.
    - `truth/loss`: mean loss of the dense model on the sequences.
    - `truth/num_tokens`: tokens of the sequences.

    A correlation is left out if one side is constant.

    Args:
        num_groups: quantile groups, at least 2.
        sample_size: atomic experts removed from each group, at least 1. None removes whole groups.
        max_sequences: how many calibration sequences to use, from the first on; at least 1. None uses all.
        seed: of the samples, at least 0.
        batch_size: sequences per forward pass, at least 1. Changes the result only by rounding.
    """

    name = "truth"
    needs = frozenset({Need.DENSE, Need.SCORES, Need.STATISTICS, Need.TOKENS})
    objectives = ("truth/spearman", "truth/pearson")

    def __init__(
        self,
        *,
        num_groups: Annotated[int, Ge(2)],
        sample_size: Annotated[int, Ge(1)] | None,
        max_sequences: Annotated[int, Ge(1)] | None,
        seed: Annotated[int, Ge(0)],
        batch_size: Annotated[int, Ge(1)],
    ) -> None:
        self.num_groups = num_groups
        self.sample_size = sample_size
        self.max_sequences = max_sequences
        self.seed = seed
        self.batch_size = batch_size

    def identity(self) -> dict[str, Any]:
        return {
            "evaluator": self.name,
            "num_groups": self.num_groups,
            "sample_size": self.sample_size,
            "max_sequences": self.max_sequences,
            "seed": self.seed,
        }

    def prepare(self, source: ModelSource) -> None:
        smallest = source.num_atomic_experts // self.num_groups
        if smallest < (self.sample_size or 1):
            wanted = f"evaluation.truth.num_groups={self.num_groups} with sample_size={self.sample_size}"
            raise ConfigError(
                f"{wanted} does not fit the model's {source.num_atomic_experts} atomic experts: each "
                f"group would hold {smallest}; lower one of them"
            )

    @torch.no_grad()
    def __call__(self, material: Material) -> Evaluation:
        model = material.model()
        scores = material.scores()
        tokens = TokenWindows(ids_NW=material.tokens().ids_NW[: self.max_sequences])
        groups = self._groups(scores, material.widths)
        score = _flat(scores.layers)
        predicted_layers = predicted_increase(scores, material.unit, material.statistics())
        predicted = None if predicted_layers is None else _flat(predicted_layers)
        removed = [_removed_of_layers(group.removed, scores) for group in groups]
        variants: list[Variant] = [unchanged, *(partial(_without, model, of_group) for of_group in removed)]
        found = self._mean_losses(model, tokens, variants, material.ranks)
        bar = progress(found, total=len(variants), description=self.name, unit="group")
        loss = next(bar)
        rows = []
        for group, loss_of_group in zip(groups, bar, strict=True):
            increase = loss_of_group - loss
            row: dict[str, float] = {
                "atomic_experts": group.size,
                "removed": len(group.removed),
                "score_sum": float(score[group.removed].sum()),
                "measured_increase": increase,
            }
            if predicted is not None:
                row["predicted_increase"] = float(predicted[group.removed].sum())
            rows.append(row)
        metrics = {"truth/loss": loss, "truth/num_tokens": tokens.ids_NW.numel(), **_correlations(rows)}
        return Evaluation(metrics, details={"unit": material.unit.value, "groups": rows})

    def _groups(self, scores: Scores, widths: Mapping[int, Sequence[int]]) -> list[Group]:
        """The groups of a model whose experts have these widths."""
        exists = {}
        for index, scores_EF in scores.layers.items():
            width_E1 = torch.tensor(widths[index]).unsqueeze(1)
            exists[index] = torch.arange(scores_EF.shape[1]) < width_E1
        return quantile_groups(
            scores, exists, num_groups=self.num_groups, sample_size=self.sample_size, seed=self.seed
        )

    def _mean_losses(
        self, model: MoEModel, tokens: TokenWindows, variants: Sequence[Variant], ranks: Ranks
    ) -> Iterator[float]:
        """Mean next-token loss of each variant of the model, in nats per predicted token.

        Raises:
            FloatingPointError: NaN or infinite.
        """
        shared = ranks.share(batches(tokens, self.batch_size))
        with use_comparable_experts(model.model):
            passed = final_hidden_states(model, shared, variants)
            for _ in variants:
                of_batches = []
                for number, (ids_NW, hidden) in enumerate(islice(passed, len(shared))):
                    loss = next_token_loss(model, hidden, ids_NW).double().sum().item()
                    of_batches.append(self._finite(loss, ranks.number(number)))
                total = sum(ranks.in_order(of_batches))
                yield total / tokens.num_predicted_tokens

    def _finite(self, loss: float, batch: int) -> float:
        """The loss of a batch.

        Raises:
            FloatingPointError: it is NaN or infinite.
        """
        if not math.isfinite(loss):
            problem = f"the loss is NaN or infinite in batch {batch}"
            raise FloatingPointError(f"{self.name}: {problem}; use a wider model.dtype")
        return loss


def _without(model: MoEModel, removed: Mapping[int, Tensor], span: Span) -> AbstractContextManager[None]:
    """The model without some atomic experts, in the layers of a span."""
    of_span = {index: removed_EF for index, removed_EF in removed.items() if index in span}
    return masked(model, of_span)


def quantile_groups(
    scores: Scores, exists: Mapping[int, Tensor], *, num_groups: int, sample_size: int | None, seed: int
) -> list[Group]:
    """Cut all atomic experts into groups of equal size (to within one), lowest scores first.

    Equal scores are in order of layer, expert and atomic expert.

    Args:
        scores: of all atomic experts.
        exists: bool (E, F) by decoder layer index, False beyond an expert's width.
        num_groups, sample_size, seed: as in `Truth`.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.sort(_flat(scores.layers), stable=True).indices
    order = order[_flat(exists)[order] > 0]
    groups = []
    for members in order.tensor_split(num_groups):
        removed = members
        if sample_size is not None:
            shuffled = torch.randperm(len(members), generator=generator)
            removed = members[shuffled[:sample_size]]
        groups.append(Group(size=len(members), removed=removed))
    return groups


def _flat(layers: Mapping[int, Tensor]) -> Tensor:
    """All layers' values in one float64 vector."""
    values = [values_EF.flatten().double() for values_EF in layers.values()]
    return torch.cat(values)


def _removed_of_layers(removed: Tensor, scores: Scores) -> dict[int, Tensor]:
    """Masks (E, F) by decoder layer index, True at the given flat positions."""
    sizes = [scores_EF.numel() for scores_EF in scores.layers.values()]
    mask = torch.zeros(sum(sizes), dtype=torch.bool)
    mask[removed] = True
    parts = zip(scores.layers.items(), mask.split(sizes), strict=True)
    return {index: part.view_as(scores_EF) for (index, scores_EF), part in parts}


def _correlations(rows: list[dict[str, float]]) -> Metrics:
    def column(name: str) -> Tensor:
        values = [row[name] for row in rows]
        return torch.tensor(values, dtype=torch.float64)

    measured = column("measured_increase")
    found: dict[str, float | None] = {}
    if "predicted_increase" in rows[0]:
        predicted = column("predicted_increase")
        found["truth/spearman"] = spearman(predicted, measured)
        found["truth/pearson"] = pearson(predicted, measured)
    else:
        found["truth/spearman"] = spearman(column("score_sum"), measured)
    return {name: value for name, value in found.items() if value is not None}
