"""What wandb's own reader finds in the files of runs that wandb really made, offline."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import pytest
from PIL import Image as Picture

from heapr.schema import TrackingConfig
from heapr.tracking.open_tracker import open_tracker
from heapr.tracking.tracker import Folder, Image
from heapr.tracking.values import log_sweep_summary
from tests.command import run_py_here
from tests.experiment import run_in, write_model, write_texts
from tests.tracking.offline_runs import OfflineRun, offline_runs, tracked_run

PERPLEXITY_ALONE = [
    "evaluation.fidelity=null",
    "evaluation.throughput=null",
    "evaluation.truth=null",
    "evaluation.efficiency=null",
]


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("experiment")
    write_model(folder / "model")
    model = ["model=hf", f"model.path={folder / 'model'}", "model.name=tiny-moe", "model.dtype=float32"]
    quick = ["pruning.save_checkpoint=false", "runtime.num_threads=1", "tracking=wandb_offline"]
    return [*model, *write_texts(folder), *PERPLEXITY_ALONE, *quick]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory, overrides: list[str]) -> tuple[Path, list[OfflineRun]]:
    """Folder of outputs and runs of one multirun with four jobs."""
    folder = tmp_path_factory.mktemp("sweep")
    result = run_py_here(
        "-m",
        *overrides,
        "pruning.ratio=0.25,0.5",
        "score=heapr,heapr_sum",
        "hydra.sweep.dir=outputs/sweeps/mine",
        folder=folder,
    )
    assert result.returncode == 0, result.stderr
    return folder / "outputs", offline_runs(folder / "outputs")


def test_four_jobs_are_four_runs_of_one_group(sweep: tuple[Path, list[OfflineRun]]) -> None:
    _, runs = sweep
    assert len(runs) == len({run.run["run_id"] for run in runs}) == 4
    assert {run.run["run_group"] for run in runs} == {"mine"}
    assert {run.run["job_type"] for run in runs} == {"experiment"}
    assert [run.run["display_name"] for run in runs] == [
        f"tiny-moe {criterion} global {ratio}%" for ratio in (25, 50) for criterion in ("heapr", "heapr_sum")
    ]
    assert runs[0].run["tags"] == ["tiny-moe", "heapr", "global", "text_files"]
    assert all(run.exit_code == 0 for run in runs)


def test_a_job_has_its_configuration_metrics_layers_and_artifacts(
    sweep: tuple[Path, list[OfflineRun]],
) -> None:
    outputs, (run, *_) = sweep
    summary = json.loads((outputs / "sweeps" / "mine" / "0" / "summary.json").read_text())
    assert {name: value for name, value in run.config.items() if name in summary["config"]} == summary[
        "config"
    ]
    assert run.config["labels"]["criterion"] == "heapr"
    name = "perplexity/text_files"
    assert run.axes[f"change/{name}"] == run.axes["atomic_experts_removed_ratio"] == "pruning.ratio"
    assert run.axes["calibration/loss"] == "calibration/tokens"
    for group, before in (("dense", "dense/"), ("pruned", "pruned/"), ("size", ""), ("comparison", "")):
        of_group = summary["metrics"][group]
        assert {metric: run.last[f"{before}{metric}"] for metric in of_group} == of_group
    dense, pruned = (summary["metrics"][group][name] for group in ("dense", "pruned"))
    assert run.last[f"change/{name}"] == pytest.approx(pruned / dense - 1)
    assert run.last["pruning.ratio"] == 0.25 and "checkpoint" not in run.last  # none was saved
    assert run.last["calibration/loss"] > 0 and run.last["calibration/tokens"] == 6 * 32
    assert run.last["stages/calibrate/seconds"] > 0
    assert [
        run.last[f"stages/{stage}/cached"] for stage in ("calibrate", "evaluate/perplexity/text_files/dense")
    ] == [False, False]

    assert run.last["figures/widths.format"] == "png" and run.last["figures/widths.width"] >= 1300
    assert (run.folder / "files" / run.last["figures/widths.path"]).is_file()
    table = run.table("layers")
    kept = {row[0]: row[table["columns"].index("atomic_experts")] for row in table["data"]}
    assert list(kept) == [0, 1] and sum(kept.values()) == 0.75 * 2 * 4 * 8
    logged = {artifact["name"]: artifact for artifact in run.artifacts if artifact["type"] != "run_table"}
    assert set(logged) == {f"{stage['stage']}-{stage['key']}" for stage in summary["stages"]}
    for stage in summary["stages"]:
        contents = logged[f"{stage['stage']}-{stage['key']}"]["manifest"]["contents"]
        references = {entry["ref"] for entry in contents}
        assert (outputs.parent / stage["path"] / "manifest.json").resolve().as_uri() in references


def test_a_repeat_is_a_run_of_its_own_that_knows_its_experiment(
    sweep: tuple[Path, list[OfflineRun]], tmp_path: Path, overrides: list[str]
) -> None:
    outputs, runs = sweep
    run_in(
        tmp_path, *overrides, f"paths.outputs={outputs}", "calibration.batch_size=3", "tracking.project=other",
        "pruning.save_checkpoint=true",
    )  # fmt: skip
    again = offline_runs(outputs)[-1]
    assert again.run["run_id"] not in {run.run["run_id"] for run in runs}
    assert again.config["key"] == runs[0].config["key"] != runs[1].config["key"]
    assert (
        Path(again.last["checkpoint"]).is_absolute()
        and Path(again.last["checkpoint"], "config.json").is_file()
    )
    assert "run_group" not in again.run
    assert again.last["stages/calibrate/cached"] is True


def test_images_and_figures_are_in_the_run_and_a_failure_is_told(tmp_path: Path) -> None:
    Picture.new("RGB", (3, 2), "red").save(tmp_path / "curve.png")
    tracked = open_tracker(TrackingConfig("offline", "p"), tracked_run(), folder=tmp_path, outputs=tmp_path)
    with suppress(RuntimeError), tracked as tracker:
        tracker.log({"figures/curve": Image(tmp_path / "curve.png")})
        raise RuntimeError
    (run,) = offline_runs(tmp_path)
    assert (run.folder / "files" / run.last["figures/curve.path"]).read_bytes() == (
        tmp_path / "curve.png"
    ).read_bytes()
    assert (run.last["figures/curve.width"], run.last["figures/curve.height"]) == (3, 2)
    assert run.exit_code == 1


def test_files_are_sent_when_that_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "artifact").mkdir()
    (tmp_path / "artifact" / "plan.txt").write_text("kept")
    settings = TrackingConfig("offline", "p", upload=True)
    with open_tracker(settings, tracked_run(), folder=tmp_path, outputs=tmp_path) as tracker:
        tracker.log({"artifacts/prune": Folder("prune", "key", tmp_path / "artifact")})
    (entry,) = offline_runs(tmp_path)[0].artifacts[0]["manifest"]["contents"]
    assert "ref" not in entry and entry["local_path"] == str(tmp_path / "artifact" / "plan.txt")


def test_a_sweep_has_a_run_with_its_table_and_figures(tmp_path: Path) -> None:
    folder = tmp_path / "sweeps" / "mine"
    folder.mkdir(parents=True)
    Picture.new("RGB", (3, 2)).save(folder / "ratio_curve.png")
    rows = [
        {"model": "a", "perplexity": 3.5},
        {"model": "b", "accuracy": 0.5},
        {"model": "c", "perplexity": "failed"},
    ]
    for _ in range(2):
        log_sweep_summary(
            TrackingConfig("offline", "p"),
            rows,
            folder=folder,
            images=[folder / "ratio_curve.png"],
            curves={0.0: {"a/x": 7.5}, 0.5: {"a/x": 9.0, "a/y": 8.0}},
            outputs=tmp_path / "outputs",
        )
    first, second = offline_runs(tmp_path / "outputs")
    assert first.run["run_id"] == second.run["run_id"]
    assert (first.run["run_group"], first.run["job_type"], first.run["display_name"]) == (
        "mine",
        "sweep",
        "mine summary",
    )
    points = [(row["pruning.ratio"], row.get("curve/a/y")) for row in first.history if "pruning.ratio" in row]
    assert points == [(0, None), (0.5, 8.0)] and first.axes["curve/a/y"] == "pruning.ratio"
    table = first.table("comparison")
    assert table["columns"] == ["model", "perplexity", "accuracy"]
    assert table["data"] == [["a", 3.5, None], ["b", None, 0.5], ["c", "failed", None]]
    assert first.last["figures/ratio_curve.format"] == "png"
    assert (folder / "tracking.jsonl").is_file()
