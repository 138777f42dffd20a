"""What tells jobs apart, and the artifacts behind them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from heapr.report.sweep.factors import UNKNOWN, describe, differing, factor, selected, show, varying
from heapr.report.sweep.results import JobResult, removed_by_layer, stage_cost
from tests.report.sweep.sweeps import config, failed, job, write_details


def test_factors_come_from_the_configuration_and_of_failed_jobs_from_what_they_left(tmp_path: Path) -> None:
    done = job(0, {}, config(ratio=0.2, criterion="HeaprSum"))
    assert [factor(done, name) for name in ("model", "ratio", "criterion", "scope", "corpus", "seed", "pruning.form")] == [
        "Mix-1.5-A2B", 0.2, "heapr_sum", "global", "wikitext2", 0, "ragged",
    ]  # fmt: skip
    lost = failed(
        1,
        "model=hf",
        "model.path=Some/Mix-1.5-A2B",
        "pruning=layer",
        "pruning.ratio=0.4",
        "score=random",
        "score=heapr",
    )
    assert [factor(lost, name) for name in ("model", "ratio", "criterion", "scope", "seed")] == [
        "Mix-1.5-A2B", 0.4, "heapr", "layer", UNKNOWN,
    ]  # fmt: skip
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra" / "config.yaml").write_text("model: {name: tiny, path: x}\ncalibration: {seed: 3}\n")
    assert factor(JobResult(2, (), tmp_path, None, "failed"), "seed") == 3


def test_jobs_are_told_apart_by_what_varies_and_chosen_by_where() -> None:
    jobs = [job(0, {}, config(0.2)), job(1, {}, config(0.4)), job(2, {}, config(0.4, "Random"))]
    assert varying(jobs, ["model", "ratio", "criterion"]) == ["ratio", "criterion"]
    assert differing(jobs) == ["score._target_", "pruning.ratio"]
    assert [found.number for found in selected(jobs, {"ratio": [0.4, 0.6], "criterion": "heapr"})] == [1]
    assert (
        describe(jobs[2], ["criterion", "ratio"]) == "random 40 % removed"
        and show("num_samples", 1024) == "1,024"
    )


def test_removed_shares_are_those_of_routing_or_of_the_plan(tmp_path: Path) -> None:
    layers = [{"layer": 1, "layer_kept_ratio": 0.6, "kept_ratio": [0.25, 0.95]}]
    entry = write_details(tmp_path / "artifacts" / "a", "routing", {"layers": layers})
    (removal,) = removed_by_layer(job(0, {}, stages=[entry])) or []
    assert (removal.layer, removal.share) == (1, pytest.approx(0.4)) and removal.share_E == pytest.approx(
        (0.75, 0.05)
    )

    folder = tmp_path / "outputs" / "artifacts" / "prune" / "p"
    folder.mkdir(parents=True)
    plan = {
        "layers.10": torch.ones(2, 4, dtype=torch.bool),
        "layers.2": torch.tensor([[True] * 4, [False] * 3 + [True]]),
    }
    save_file(plan, folder / "plan.safetensors")
    pruned = {
        "stage": "prune",
        "what": "",
        "key": "p",
        "path": "outputs/artifacts/prune/p",
        "cached": False,
        "seconds": 1.0,
    }
    settings = job(0, {}, stages=[pruned])
    assert removed_by_layer(settings) is None  # a relative path leads nowhere from here
    found = (
        removed_by_layer(
            JobResult(0, (), tmp_path / "outputs" / "sweeps" / "x" / "0", settings.summary, None)
        )
        or []
    )
    assert [(layer.layer, layer.share, layer.share_E) for layer in found] == [
        (2, 0.375, (0.0, 0.75)),
        (10, 0.0, (0.0, 0.0)),
    ]


def test_the_cost_of_a_cached_stage_is_that_of_making_it(tmp_path: Path) -> None:
    made = {
        "stage": "calibrate",
        "what": "",
        "key": "k",
        "path": str(tmp_path),
        "cached": False,
        "seconds": 5.0,
        "peak_memory_bytes": 7,
    }
    cached = made | {"cached": True, "seconds": 0.0, "peak_memory_bytes": 0}
    assert stage_cost(job(0, {}, stages=[made]), "calibrate", "peak_memory_bytes") == 7
    assert stage_cost(job(0, {}, stages=[cached]), "calibrate", "seconds") is None
    (tmp_path / "manifest.json").write_text('{"seconds": 4.5}')
    assert stage_cost(job(0, {}, stages=[cached]), "calibrate", "seconds") == 4.5
