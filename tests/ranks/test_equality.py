"""Several processes find what one finds, also after one of them was killed: statistics, plan, metrics."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from heapr import artifacts
from tests.experiment import run_in, write_model, write_texts
from tests.ranks import several_runs
from tests.ranks.processes import finish, start
from tests.ranks.several_runs import Kill

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


def assert_same(folder: Path, alone: Path, *, size: int, tolerance: float = 1e-6) -> None:
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
        assert_same_metrics(metrics_of(found_by(rank, folder)["metrics"]), expected_metrics, tolerance)
    assert {path.parent.name for path in folder.glob("run-*/*")} == {"run-0"}
    left = [path for path in outputs.rglob(".*") if "scratch" in path.name or "seen-by-all" in path.name]
    assert left == []


def assert_same_metrics(found: dict[str, float], expected: dict[str, float], tolerance: float) -> None:
    """An increase is the difference of two perplexities, which are near each other here, and is compared with
    them."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = value
        if name.startswith("comparison perplexity_increase"):
            scale = expected[f"pruned perplexity/{name.partition('/')[2]}"]
        assert found[name] == pytest.approx(value, rel=0, abs=tolerance * abs(scale) + 1e-9), name


def found_by(rank: int, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"rank-{rank}.json").read_text())
    return found


FAR_FEWER = ["evaluation.zero_shot=null", "evaluation.throughput=null", "evaluation.efficiency=null"]
REPAIRED = ["pruning/repair=stream", *FAR_FEWER]
# Two batches, and one of each measurement, for three ranks; the layer's equations are never formed.
FEW = ["calibration.batch_size=4", "evaluation.perplexity.batch_size=100", "evaluation.truth=null"]
IDLE = [*REPAIRED, *FEW, "runtime.stream=true", "pruning.repair.direct_up_to=0"]
# This repair adds products of float32 in another order; differences were below 5e-7.
ROUNDING = 4e-6


@pytest.mark.slow
def test_two_ranks_of_which_one_is_killed_find_what_one_process_finds(tmp_path: Path) -> None:
    """Killed behind the repair of the first layer in memory; streamed, in calibration and behind the repair of the
    first layer. The same command goes on each time."""
    write_model(tmp_path / "model")
    plain = options_of(tmp_path, "pruning/repair=expert", *ZERO_SHOT)
    repaired = options_of(tmp_path, *REPAIRED)
    streamed = [*repaired, "runtime.stream=true"]
    several, alone = tmp_path / "several", tmp_path / "alone"

    def run_ranks(experiments: dict[str, list[str]], *killed: Any) -> None:
        started = start(2, several_runs.main, several, experiments, *killed)
        if not alone.exists():
            run_in(alone / "plain", *plain)
            run_in(alone / "repaired", *repaired)
        codes = [code for code, _ in finish(started, 150)]
        assert codes == ([1, -signal.SIGKILL] if killed else [0, 0])

    run_ranks({"plain": plain, "repaired": repaired}, Kill("repaired", "memory", 1))
    assert_same(several / "plain", alone / "plain", size=2)
    run_ranks({"repaired": repaired, "streamed": streamed}, Kill("streamed", "files", 2))
    assert_same(several / "repaired", alone / "repaired", size=2, tolerance=ROUNDING)
    run_ranks({"streamed": streamed}, Kill("streamed", "files", 2))
    run_ranks({"streamed": streamed})
    assert_same(several / "streamed", alone / "repaired", size=2, tolerance=ROUNDING)
    # Only the repair of the second layer was left, and of the first if rank 0 had not recorded it.
    records = [found_by(rank, several / "streamed")["records"] for rank in range(2)]
    assert records in ([1, 1], [2, 2])


@pytest.mark.slow
def test_more_ranks_than_batches_find_what_one_process_finds(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    options = options_of(tmp_path, *IDLE)
    started = start(3, several_runs.main, tmp_path / "several", {"idle": options})
    run_in(tmp_path / "alone", *options)
    ended = finish(started, 150)
    assert [code for code, _ in ended] == [0] * 3, ended
    assert_same(tmp_path / "several" / "idle", tmp_path / "alone", size=3, tolerance=ROUNDING)


@pytest.mark.slow
def test_rank_0_alone_writes_and_prints(tmp_path: Path) -> None:
    """As torchrun starts run.py; the second time everything is found."""
    model, outputs = f"model.path={write_model(tmp_path / 'model')}", tmp_path / "outputs"
    texts = [text for text in write_texts(tmp_path) if "evaluation" not in text]
    options = ["model=hf", model, *texts, "evaluation=none", "tracking=none", f"paths.outputs={outputs}"]
    for number in (1, 2):
        ended = finish(start(2, several_runs.command, options), 60)
        assert [code for code, _ in ended] == [0, 0], ended
        (_, first), (_, second) = ended
        assert first.count("dense vs. pruned") == 1
        assert second == ""
        assert len([*outputs.glob("runs/*/summary.json")]) == len([*outputs.glob("runs/*")]) == number
    assert first.count("cached") >= len(["calibrate", "score", "prune"])
