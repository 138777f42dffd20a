"""Several processes find what one finds: statistics, plan, repaired weights, metrics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from heapr import artifacts
from tests.experiment import run_in, write_model, write_texts
from tests.ranks.processes import finish, start

ZERO_SHOT = ["evaluation.zero_shot.limit=3"]
TIMINGS = ("seconds", "speedup", "per_second", "peak_memory")


def options_of(folder: Path, *more: str) -> list[str]:
    """Seven sequences in batches of one on a tiny model; a later value counts."""
    texts = [text for text in write_texts(folder) if "zero_shot" not in text]
    model = ["model=hf", f"model.path={folder / 'model'}", "model.dtype=float32"]
    sizes = ["calibration.num_samples=7", "calibration.batch_size=1", "pruning.ratio=0.4"]
    return [*model, *texts, *sizes, *more]


def artifact(outputs: Path, stage: str) -> Path:
    """The only one of its stage."""
    (manifest,) = (outputs / "artifacts" / stage).glob("*/manifest.json")
    return manifest.parent


def metrics_of(metrics: dict[str, dict[str, float]]) -> dict[str, float]:
    """All that time nothing."""
    found = {}
    for part, values in metrics.items():
        for name, value in values.items():
            if not any(word in name for word in TIMINGS):
                found[f"{part} {name}"] = value
    return found


def assert_same(folder: Path, alone: Path, *, size: int, tolerance: float) -> None:
    """Statistics, plan and metrics of `size` ranks, and those of one process."""
    outputs = folder / "outputs"
    mine = artifacts.read_statistics(artifact(outputs, "calibrate"))
    theirs = artifacts.read_statistics(artifact(alone / "outputs", "calibrate"))
    assert (mine.num_tokens, mine.num_predicted_tokens) == (theirs.num_tokens, theirs.num_predicted_tokens)
    assert mine.loss_sum == pytest.approx(theirs.loss_sum, rel=1e-12)
    for index, layer in theirs.layers.items():
        for name, expected in layer.items():
            found = getattr(mine.layers[index], name)
            if name in {"count_E", "ph_abs_max_EF"}:
                assert torch.equal(found, expected), name
            # Sums of both signs are compared with the largest.
            scale = expected.abs().max() if name == "gh_sum_EF" else expected.abs()
            assert ((found - expected).abs() <= 1e-12 * scale).all(), name
    plan = artifacts.read_plan(artifact(outputs, "prune"))
    expected_plan = artifacts.read_plan(artifact(alone / "outputs", "prune"))
    assert all(torch.equal(plan.layers[index], kept) for index, kept in expected_plan.layers.items())
    (summary,) = alone.glob("run/summary.json")
    expected_metrics = metrics_of(json.loads(summary.read_text())["metrics"])
    for rank in range(size):
        metrics: dict[str, Any] = json.loads((folder / f"rank-{rank}.json").read_text())
        assert metrics_of(metrics) == pytest.approx(expected_metrics, rel=tolerance, abs=1e-9)
    assert {path.parent.name for path in folder.glob("run-*/*")} == {"run-0"}
    left = [path for path in outputs.rglob(".*") if "scratch" in path.name or "seen-by-all" in path.name]
    assert left == []


FAR_FEWER = ["evaluation.zero_shot=null", "evaluation.throughput=null", "evaluation.efficiency=null"]
# Two batches, and one of each measurement, for three ranks; the layer's equations are never formed.
FEW = ["calibration.batch_size=4", "evaluation.perplexity.batch_size=100", "evaluation.truth=null"]
STREAMED = ["runtime.stream=true", "pruning.repair.direct_up_to=0"]
# Options, and tolerance of metrics: this repair adds products of float32 in another order.
PLAIN = (["pruning/repair=expert", *ZERO_SHOT], 1e-6)
REPAIRED = (["pruning/repair=stream", *FAR_FEWER], 2e-5)
IDLE = (["pruning/repair=stream", *FAR_FEWER, *FEW, *STREAMED], 2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "experiments"), [(2, {"plain": PLAIN, "repaired": REPAIRED}), (3, {"idle": IDLE})]
)
def test_ranks_find_what_one_process_finds(
    size: int, experiments: dict[str, tuple[list[str], float]], tmp_path: Path
) -> None:
    write_model(tmp_path / "model")
    options = {name: options_of(tmp_path, *more) for name, (more, _) in experiments.items()}
    command = ["-m", "tests.ranks.several_runs", str(tmp_path / "several"), json.dumps(options)]
    processes = start(size, command)
    for name in experiments:
        run_in(tmp_path / "alone" / name, *options[name])
    ended = finish(processes, 100)
    assert [code for code, _ in ended] == [0] * size, ended
    for name, (_, tolerance) in experiments.items():
        folder, alone = tmp_path / "several" / name, tmp_path / "alone" / name
        assert_same(folder, alone, size=size, tolerance=tolerance)
