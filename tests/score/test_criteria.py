"""Every option of conf/score on every way to store experts, against the slow oracle where there is data."""

from __future__ import annotations

import pytest
import torch

from heapr.calibration.collector import collect
from heapr.model.moe import MoEModel
from heapr.plugins import build
from heapr.pruning.surgery import remove
from heapr.score.criterion import Criterion
from heapr.types import Granularity, Plan, Scores
from tests.experiment import CONF, compose_experiment
from tests.oracle import published_scores, visited_scores
from tests.tiny import LAYOUTS, tiny_ids, tiny_model

IDS_NW = tiny_ids(num_sequences=2, length=10)


@pytest.fixture(scope="module")
def criteria() -> dict[str, Criterion]:
    names = sorted(path.stem for path in (CONF / "score").glob("*.yaml"))
    return {name: build(compose_experiment(f"score={name}").score, "score") for name in names}


def scores_of(model: MoEModel, criteria: dict[str, Criterion]) -> dict[str, Scores]:
    statistics = collect(model, [IDS_NW])
    layers = {layer.index: layer for layer in model.layers}
    return {
        name: criterion(statistics, lambda index: layers[index].weights())
        for name, criterion in criteria.items()
    }


@pytest.mark.parametrize("family", LAYOUTS)
def test_scores_equal_the_oracle(family: str, criteria: dict[str, Criterion]) -> None:
    scores = scores_of(MoEModel(tiny_model(family)), criteria)
    expected = visited_scores(tiny_model(family), IDS_NW, alpha=0.9)
    expected["heapr"] = published_scores(tiny_model(family), IDS_NW)
    expected["heapr_expert"] = [
        torch.where(score_EF[:, :1] < 0, -1, score_EF.sum(dim=1, keepdim=True)).expand_as(score_EF)
        for score_EF in expected["heapr"]
    ]
    assert expected.keys() == criteria.keys() - {"heapr_sum", "fisher", "magnitude", "random"}
    for name, layers in expected.items():
        for found_EF, expected_EF in zip(scores[name].layers.values(), layers, strict=True):
            # What rounding leaves where terms cancel.
            cancelled = 1e-5 * float(expected_EF.max()) if name == "taylor" else 0.0
            torch.testing.assert_close(found_EF.double(), expected_EF, rtol=1e-4, atol=cancelled + 1e-12)
            assert (expected_EF > 0).any(), name


@pytest.mark.parametrize("family", LAYOUTS)
def test_all_criteria_score_dense_and_pruned_models(family: str, criteria: dict[str, Criterion]) -> None:
    """`Scores` refuses what is not finite."""
    model = MoEModel(tiny_model(family))
    generator = torch.Generator().manual_seed(0)
    kept = {
        layer.index: torch.rand(layer.num_experts, layer.width, generator=generator) > 0.4
        for layer in model.layers
    }
    kept[model.layers[0].index][0] = False
    check_scores(model, criteria)
    remove(model, Plan(layers=kept))
    check_scores(model, criteria)


def check_scores(model: MoEModel, criteria: dict[str, Criterion]) -> None:
    shapes = {layer.index: (layer.num_experts, layer.width) for layer in model.layers}
    for name, scores in scores_of(model, criteria).items():
        assert {index: tuple(scores_EF.shape) for index, scores_EF in scores.layers.items()} == shapes, name
        if criteria[name].granularity is Granularity.EXPERT:
            assert all((scores_EF == scores_EF[:, :1]).all() for scores_EF in scores.layers.values()), name
