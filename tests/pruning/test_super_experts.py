"""Super experts: found by hand-computed numbers, told in the report, and protected on request."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

from heapr.calibration.collector import collect
from heapr.errors import ConfigError
from heapr.model.experts.dispatch import observe_experts
from heapr.model.moe import MoEModel
from heapr.pruning.allocation import allocate
from heapr.pruning.budget import Budget
from heapr.pruning.super_experts import describe_super_experts, find_super_experts
from heapr.pruning.surgery import remove
from heapr.report.sweep.report import write_report
from heapr.report.sweep.results import JobResult
from heapr.types import Plan, Scores
from tests.experiment import compose_experiment, run_in, write_model, write_texts
from tests.same import logits
from tests.tiny import layer_statistics, statistics_of, tiny_ids, tiny_model

WIDTHS = {0: [4, 4], 1: [4, 4]}
SCORES = Scores(layers={index: torch.arange(8.0).view(2, 4) + 8 * index for index in (0, 1)})


def test_by_hand() -> None:
    statistics = statistics_of(
        {
            3: layer_statistics([1, 1], ph_abs_max=[[1.0, 2.0], [0.0, 50.0]]),
            5: layer_statistics([1, 1], ph_abs_max=[[4.0, 0.0], [1.0, 1.0]]),
        }
    )
    down_max = {3: torch.tensor([[3.0, 1.0], [9.0, 2.0]]), 5: torch.tensor([[0.5, 9.0], [4.0, 1.0]])}
    found = find_super_experts(statistics, down_max.__getitem__)  # a_e: 3, 100, 2, 4; the lower median is 3
    assert found == ((3, 1, 100.0, pytest.approx(100 / 3)),)
    line = "super experts, by their largest |p h w| over the median expert's: layer 3 expert 1 (33.3 x)"
    assert describe_super_experts(found) == line


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "nemotron_h"])
def test_the_magnitude_is_the_largest_element_that_any_atomic_expert_adds(family: str) -> None:
    """Of ragged experts too, against all elements of all contributions."""
    model = MoEModel(tiny_model(family))
    kept = {layer.index: torch.rand(layer.num_experts, layer.width) > 0.3 for layer in model.layers}
    ragged = MoEModel(copy.deepcopy(model.model))
    remove(ragged, Plan(layers=kept))
    ids_NW = tiny_ids(2, 8)
    for each in (model, ragged):
        layer = each.layers[-1]
        downs = layer.weights().down_EDF
        largest = torch.zeros(layer.num_experts)

        def look(h_SF, p_S1, _, offsets_E, downs=downs, largest=largest) -> None:  # rows sorted by expert
            bounds = offsets_E.tolist()
            for expert in range(len(largest)):
                of_expert = slice(bounds[expert], bounds[expert + 1])
                ph_SF = (p_S1.view(-1, 1) * h_SF)[of_expert, : downs.shape[2]]
                added_SDF = ph_SF.unsqueeze(1) * downs[expert]
                largest[expert] = max(largest[expert], added_SDF.abs().max() if len(added_SDF) else 0)

        with observe_experts(each.model, [(layer.experts, look)]):
            logits(each.model, ids_NW)
        statistics = collect(each, [ids_NW])
        ph_abs_max_EF = statistics.layers[layer.index].ph_abs_max_EF.cpu().float()
        found_E = (ph_abs_max_EF * layer.down_abs_max()).amax(dim=1)
        torch.testing.assert_close(found_E, largest, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_protected_experts_lose_nothing_and_the_others_more(scope: str) -> None:
    budget = Budget(ratio=0.25, scope=scope, experts_per_token=1, protected_experts=((0, 0), (1, 1)))
    plan = allocate(SCORES, WIDTHS, budget)
    assert plan.layers[0][0].all() and plan.layers[1][1].all() and plan.num_kept == 12
    greedy = Budget(ratio=0.6, scope=scope, experts_per_token=1, protected_experts=((0, 0), (1, 1)))
    with pytest.raises(ConfigError, match="ratio"):
        allocate(SCORES, WIDTHS, greedy)


def test_a_run_tells_them_and_protects_them_on_request(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    folder = write_model(tmp_path / "model")
    unmeasured = ("perplexity", "throughput", "truth", "fidelity", "efficiency", "routing")
    overrides = ["model=hf", f"model.path={folder}", "model.dtype=float32", "pruning.ratio=0.5"]
    overrides += [*write_texts(tmp_path), *(f"evaluation.{name}=null" for name in unmeasured)]
    removed, jobs = [], []
    for option in ("false", "true"):
        summary = run_in(tmp_path, *overrides, f"pruning.protect_super_experts={option}", "score=random")
        artifact = next(Path(stage["path"]) for stage in summary.stages if stage["stage"] == "prune")
        report = json.loads((artifact / "allocation.json").read_text())
        (only,) = report["super_experts"]
        written = json.loads((tmp_path / "run" / "summary.json").read_text())
        assert written["super_experts"] == {"are_protected": option == "true", "found": [only]}
        jobs.append(JobResult(len(jobs), (), folder=None, summary=written, error=None))
        config = json.loads((artifact / "checkpoint" / "config.json").read_text())
        place = f".{only['layer']}."
        widths = next(width for name, width in config["expert_widths"].items() if place in name)
        removed.append(widths[only["expert"]])
    assert f"layer {only['layer']} expert {only['expert']} ({only['times_median']:.3g} x)" in caplog.text
    assert removed[0] < removed[1] == 8
    page = write_report(jobs, {}, tmp_path / "report", None)[-1].read_text()
    cells = f"<td>{only['layer']}</td><td>{only['expert']}</td><td>{only['times_median']:.3g}</td>"
    for is_protected in ("no", "yes"):
        assert f"{cells}<td>1 of 1</td><td>{is_protected}</td></tr>" in page


def test_it_is_refused_where_it_cannot_be() -> None:
    with pytest.raises(
        ConfigError, match=r"pruning.protect_super_experts=True has no effect with scope 'expert'"
    ):
        compose_experiment("pruning=expert", "pruning.protect_super_experts=true")
