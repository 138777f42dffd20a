"""Score against truth: against brute force, and with units computed by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from heapr.evaluation.truth import Truth, quantile_groups
from heapr.model.moe import MoEModel
from heapr.score.criterion import Criterion
from heapr.score.data_free import Random
from heapr.score.gradient import Heapr, HeaprSum
from heapr.types import Scores
from tests.evaluation.material import material_of
from tests.tiny import tiny_ids


def truth(num_groups: int = 4, sample_size: int | None = None, max_sequences: int | None = None) -> Truth:
    return Truth(
        num_groups=num_groups, sample_size=sample_size, max_sequences=max_sequences, seed=0, batch_size=3
    )


def brute_force_loss(
    causal_lm: PreTrainedModel, ids_NW: Tensor, removed: list[tuple[int, int, int]]
) -> float:
    """Mean loss of a copy without some (layer, expert, atomic expert), from transformers' own loss."""
    without = copy.deepcopy(causal_lm)
    with torch.no_grad():
        for layer, expert, atomic in removed:
            without.model.layers[layer].mlp.experts.down_proj[expert, :, atomic] = 0
        return without(input_ids=ids_NW, labels=ids_NW).loss.item()


@pytest.mark.parametrize("max_sequences", [None, 3, 100])
def test_measured_increase_equals_brute_force(causal_lm: PreTrainedModel, max_sequences: int | None) -> None:
    ids_NW = tiny_ids(8, 12)
    material = material_of(causal_lm, ids_NW)
    before = copy.deepcopy(causal_lm.state_dict())
    found = truth(max_sequences=max_sequences)(material)
    used = ids_NW[:max_sequences]
    dense = brute_force_loss(causal_lm, used, [])
    assert found.metrics["truth/loss"] == pytest.approx(dense, rel=1e-6)
    assert found.metrics["truth/num_tokens"] == used.numel()
    ranked = sorted(
        (float(material.scores().layers[i][e, k]), (i, e, k))
        for i in (0, 1)
        for e in range(4)
        for k in range(8)
    )
    for number, row in enumerate(found.details["groups"]):
        members = [place for _, place in ranked[16 * number : 16 * (number + 1)]]
        assert row["measured_increase"] == pytest.approx(
            brute_force_loss(causal_lm, used, members) - dense, abs=2e-6
        )
        assert row["removed"] == row["atomic_experts"] == 16
        assert row["predicted_increase"] == pytest.approx(
            sum(score for score, _ in ranked[16 * number : 16 * (number + 1)]), rel=1e-6
        )
    assert all(torch.equal(tensor, before[name]) for name, tensor in causal_lm.state_dict().items())


def test_groups_are_quantiles_with_seeded_samples() -> None:
    scores = Scores(layers={0: torch.tensor([[5.0, 1.0, 1.0]]), 3: torch.tensor([[0.0, 9.0, 9.0]])})
    # An expert of width 2.
    exists = {
        0: torch.ones(1, 3, dtype=torch.bool),
        3: torch.tensor([[True, True, False]]),
    }
    assert [(g.size, g.removed.tolist()) for g in quantile_groups(scores, exists, num_groups=2, sample_size=None, seed=0)] == [
        (3, [3, 1, 2]), (2, [0, 4]),
    ]  # fmt: skip
    many = Scores(layers={0: torch.arange(100.0).view(4, 25)})
    exists = {0: torch.ones(4, 25, dtype=torch.bool)}
    samples = [quantile_groups(many, exists, num_groups=10, sample_size=3, seed=seed) for seed in (0, 0, 1)]
    for number, group in enumerate(samples[0]):
        assert group.size == 10 and len(set(group.removed.tolist())) == 3
        assert all(10 * number <= place < 10 * (number + 1) for place in group.removed.tolist())
    chosen = [[group.removed.tolist() for group in groups] for groups in samples]
    assert chosen[0] == chosen[1] != chosen[2]


def test_units(causal_lm: PreTrainedModel) -> None:
    """heapr predicts what heapr_sum predicts once it is brought to nats; scores without unit give an order
    only."""
    ids_NW = tiny_ids(1, 8)

    def measure(criterion: Criterion):
        return truth(num_groups=64)(material_of(causal_lm, ids_NW, criterion=criterion))

    heapr, heapr_sum, random = measure(Heapr()), measure(HeaprSum()), measure(Random(seed=0))

    def predicted(found) -> list[float]:
        return sorted(row["predicted_increase"] for row in found.details["groups"])

    assert predicted(heapr) == pytest.approx(predicted(heapr_sum), rel=1e-5)
    assert (
        "truth/pearson" in heapr.metrics
        and "truth/pearson" not in random.metrics
        and "truth/spearman" in random.metrics
    )
    assert "predicted_increase" not in random.details["groups"][0]


def test_not_a_number_is_refused(causal_lm: PreTrainedModel) -> None:
    material = material_of(causal_lm, tiny_ids(2, 8))
    with torch.no_grad():
        MoEModel(causal_lm).model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="truth: the loss is NaN or infinite"):
        truth()(material)
