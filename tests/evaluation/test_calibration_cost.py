"""The published two-stage procedure gives the scores of the one pass, and both are measured."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from heapr.calibration.collector import collect
from heapr.evaluation.calibration_cost import CalibrationCost
from heapr.evaluation.two_stage import two_stage_scores
from heapr.model.moe import MoEModel
from heapr.score.gradient import Heapr
from heapr.types import TokenWindows
from tests.evaluation.material import only
from tests.tiny import no_weights


@pytest.mark.parametrize("frozen", [True, False])
def test_two_stages_give_the_scores_of_one(model: MoEModel, ids_NW: Tensor, frozen: bool) -> None:
    batches = list(ids_NW.split(3))
    expected = Heapr()(collect(model, batches), no_weights).layers
    found = two_stage_scores(model, batches, frozen=frozen)
    assert all(parameter.grad is None for parameter in model.model.parameters())
    assert found.keys() == expected.keys()
    for index, scores_EF in expected.items():
        torch.testing.assert_close(found[index], scores_EF.clamp(min=0), rtol=1e-4, atol=0)


def test_cost_of_both_is_measured(model: MoEModel, ids_NW: Tensor) -> None:
    material = only(model=model, tokens=TokenWindows(ids_NW=ids_NW))
    evaluation = CalibrationCost(num_sequences=4, batch_size=2, repeats=2)(material)
    metrics = evaluation.metrics
    # Layers, experts, D x D, float32.
    assert metrics["calibration_state_bytes/two_stage"] == 2 * 4 * 16 * 16 * 4
    assert metrics["calibration_score_difference"] < 1e-4
    for name in ("heapr", "two_stage"):
        assert metrics[f"calibration_seconds/{name}"] > 0
        state = metrics[f"calibration_state_bytes/{name}"]
        assert metrics[f"calibration_peak_memory_bytes/{name}"] > model.model.num_parameters() * 4 + state
    assert len(evaluation.details["seconds"]["heapr"]) == 2 and evaluation.details["out_of_memory"] == []
