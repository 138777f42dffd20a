"""Score against truth: what the scores predict for a group of atomic experts, and what their removal really
does.

In: the dense model, scores and calibration tokens. Out: how prediction and measured increase of the mean loss
correlate over groups; both for every group in `details.json`. Nothing of the plan matters, so it is made once
per score.
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
from heapr.model.moe import MoEModel, next_token_loss
from heapr.model.passes import Variant, final_hidden_states, unchanged
from heapr.model.span import Span
from heapr.progress import progress
from heapr.pruning.masking import masked
from heapr.score.criterion import predicted_increase
from heapr.text.windows import batches
from heapr.types import Evaluation, Metrics, Scores, TokenWindows


@dataclass(frozen=True)
class Group:
    """Atomic experts of one score quantile.

    Attributes:
        size: atomic experts in the quantile.
        removed: flat positions (layer, expert, atomic expert) of those that are removed together.
    """

    size: int
    removed: Tensor


class Truth:
    """All atomic experts, of all layers, are ranked by score and cut into groups of equal size (up to one).
    Of each group a seeded random sample is removed at once, nothing else with it, and the mean next-token
    loss is measured on calibration sequences: those that the scores were taken from and that they predict.

    The prediction for a group is the sum over what was removed, as if atomic experts did not act together; in
    nats where the criterion has a unit (`heapr_sum` and `fisher` as they are, `heapr` times n/N,
    docs/method.md (7)), otherwise the bare sum of scores, of which only the order means something. Nats too
    are predicted too low, by `fisher` at about half of what is measured in the highest decile (built-in
    model), also where each is removed alone: squared gradients are less than the curvature, and the first
    order is left out (docs/method.md, Evaluation). Trust ranks before values.

    Metrics: `truth/spearman`, the rank correlation of sum and measured increase over the groups;
    `truth/pearson`, that of the values, for criteria with a unit (each left out where one side is constant);
    `truth/loss`, the dense model's mean loss on the sequences; `truth/num_tokens`.

    Args:
        num_groups: quantile groups, at least 2.
        sample_size: atomic experts removed of each group, at least 1; none removes whole groups.
        max_sequences: calibration sequences to measure on, the first of them, at least 1; none measures on
            all.
        seed: of the samples, at least 0.
        batch_size: sequences per forward pass, at least 1; changes the result by rounding alone.
    """

    name = "truth"
    needs = frozenset({Need.DENSE, Need.SCORES, Need.STATISTICS, Need.TOKENS})

    def __init__(
        self,
        *,
        num_groups: Annotated[int, Ge(2)],
        sample_size: Annotated[int, Ge(1)] | None,
        max_sequences: Annotated[int, Ge(1)] | None,
        seed: Annotated[int, Ge(0)],
        batch_size: Annotated[int, Ge(1)],
    ) -> None:
        self.num_groups, self.sample_size, self.max_sequences = num_groups, sample_size, max_sequences
        self.seed, self.batch_size = seed, batch_size

    def identity(self) -> dict[str, Any]:
        sizes = {
            "num_groups": self.num_groups,
            "sample_size": self.sample_size,
            "max_sequences": self.max_sequences,
        }
        return {"evaluator": self.name, **sizes, "seed": self.seed}

    def prepare(self, source: ModelSource) -> None:
        smallest = source.num_atomic_experts // self.num_groups
        if smallest < (self.sample_size or 1):
            wanted = f"evaluation.truth.num_groups={self.num_groups} with sample_size={self.sample_size}"
            raise ConfigError(
                f"{wanted} does not fit the model's {source.num_atomic_experts} atomic experts: groups of"
                f" {smallest}; lower one of them"
            )

    @torch.no_grad()
    def __call__(self, material: Material) -> Evaluation:
        model, scores = material.model(), material.scores()
        tokens = TokenWindows(ids_NW=material.tokens().ids_NW[: self.max_sequences])
        groups = self._groups(scores, material.widths)
        score = _flat(scores.layers)
        predicted_layers = predicted_increase(scores, material.unit, material.statistics())
        predicted = None if predicted_layers is None else _flat(predicted_layers)
        removed = [_removed_of_layers(group.removed, scores) for group in groups]
        variants = [unchanged, *(partial(_without, model, of_group) for of_group in removed)]
        found = self._mean_losses(model, tokens, variants)
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
        exists = {}
        for index, scores_EF in scores.layers.items():
            width_E1 = torch.tensor(widths[index]).unsqueeze(1)
            exists[index] = torch.arange(scores_EF.shape[1]) < width_E1
        return quantile_groups(
            scores, exists, num_groups=self.num_groups, sample_size=self.sample_size, seed=self.seed
        )

    def _mean_losses(
        self, model: MoEModel, tokens: TokenWindows, variants: Sequence[Variant]
    ) -> Iterator[float]:
        """Nats per predicted token, of each variant of the model.

        Raises:
            FloatingPointError: NaN or infinite.
        """
        all_batches = list(batches(tokens, self.batch_size))
        with use_comparable_experts(model.model):
            passed = final_hidden_states(model, all_batches, variants)
            for _ in variants:
                total = 0.0
                for ids_NW, hidden in islice(passed, len(all_batches)):
                    total += next_token_loss(model, hidden, ids_NW).double().sum().item()
                if not math.isfinite(total):
                    raise FloatingPointError(
                        f"{self.name}: the loss is NaN or infinite; use a wider model.dtype"
                    )
                yield total / tokens.num_predicted_tokens


def _without(model: MoEModel, removed: Mapping[int, Tensor], span: Span) -> AbstractContextManager[None]:
    """The model without some atomic experts, in the layers of a span."""
    return masked(model, {index: removed_EF for index, removed_EF in removed.items() if index in span})


def quantile_groups(
    scores: Scores, exists: Mapping[int, Tensor], *, num_groups: int, sample_size: int | None, seed: int
) -> list[Group]:
    """Groups of equal size (up to one), lowest scores first, ties in order of layer, expert and atomic
    expert.

    Args:
        scores: of all atomic experts.
        exists: bool (E, F) by decoder layer index, false where an expert of individual width has none.
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
    return torch.cat([values_EF.flatten().double() for values_EF in layers.values()])


def _removed_of_layers(removed: Tensor, scores: Scores) -> dict[int, Tensor]:
    """Masks (E, F) by decoder layer index from flat positions."""
    sizes = [scores_EF.numel() for scores_EF in scores.layers.values()]
    mask = torch.zeros(sum(sizes), dtype=torch.bool)
    mask[removed] = True
    parts = zip(scores.layers.items(), mask.split(sizes), strict=True)
    return {index: part.view_as(scores_EF) for (index, scores_EF), part in parts}


def _correlations(rows: list[dict[str, float]]) -> Metrics:
    def column(name: str) -> Tensor:
        return torch.tensor([row[name] for row in rows], dtype=torch.float64)

    has_unit = "predicted_increase" in rows[0]
    expected, measured = (
        column("predicted_increase" if has_unit else "score_sum"),
        column("measured_increase"),
    )
    found = {
        "truth/spearman": spearman(expected, measured),
        "truth/pearson": pearson(expected, measured) if has_unit else None,
    }
    return {name: value for name, value in found.items() if value is not None}
