"""Sweeps of a tiny model, really run: failures, starting again, reports, and two processes at once.

Jobs run in this process, but for those of which one process must not be in the way of another.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from heapr.errors import ConfigError
from heapr.overrides import LAUNCHER_EXTRAS
from heapr.sweep.collect import Record, collect_jobs, newest_sweep
from heapr.sweep.command_line import keep_results, run_command
from heapr.sweep.launch import launch, new_folder
from tests.command import ROOT, run_here
from tests.experiment import write_model, write_texts

IMPOSSIBLE = "0.999"  # fewer atomic experts than layers would be left


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A folder, and overrides that make the built-in model's version of an experiment small."""
    folder = tmp_path_factory.mktemp("sweep")
    texts = [
        o for o in write_texts(folder) if not o.startswith(("evaluation.throughput", "evaluation.truth"))
    ]
    model = [
        "model=tiny",
        f"model.path={write_model(folder / 'model')}",
        "tracking=none",
        "runtime.num_threads=1",
    ]
    return folder, [*model, f"paths.outputs={folder / 'outputs'}", *texts]


def run_jobs_here(patch: pytest.MonkeyPatch) -> None:
    def run(command: Sequence[str]) -> int:
        return run_here(command, Path.cwd()).returncode

    patch.setattr("heapr.sweep.launch.run_and_end", run)


def sweep(*arguments: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        run_jobs_here(patch)
        with pytest.raises(SystemExit) as stopped:
            run_command(arguments, ROOT)
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


def summaries(outputs: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(outputs.glob("sweeps/*/*/summary.json"))]


@pytest.fixture(scope="module")
def swept(material: tuple[Path, list[str]]) -> Path:
    """The folder of a sweep whose second job fails."""
    folder, overrides = material
    assert sweep("experiment=ratio_curve", *overrides, f"pruning.ratio=0.4,{IMPOSSIBLE}") == 1
    (made,) = (folder / "outputs" / "sweeps").iterdir()
    return made


def test_a_failed_job_is_told_and_the_others_finish(swept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finished, failed = collect_jobs(swept)
    assert finished.summary is not None and finished.summary["config"]["pruning"]["ratio"] == 0.4
    assert (
        failed.summary is None
        and failed.error is not None
        and failed.error.startswith(f"pruning.ratio={IMPOSSIBLE}")
    )
    assert sweep(f"report_dir={swept}") == 1
    told = capsys.readouterr().out
    assert "1 of 2 jobs finished" in told and "job 1 failed" in told and failed.error in told
    assert (swept / "table.md").is_file() and (swept / "report.html").is_file()


def test_a_sweeps_summary_run_has_its_table_and_figures(swept: Path) -> None:
    (line,) = (swept / "tracking.jsonl").read_text().splitlines()
    summary = json.loads(line)
    assert len(summary["comparison"]["rows"]) == 2 and summary["figures/ratio_curve"] == {
        "path": str(swept / "ratio_curve.png")
    }


def test_a_report_is_made_again_from_the_artifacts_alone(
    swept: Path, material: tuple[Path, list[str]]
) -> None:
    (swept / "report.html").unlink()
    replace(Record.read(swept), title="as it was called once", report=[]).write(swept)
    assert sweep("experiment=ratio_curve", "report_only=true", *material[1]) == 1
    page = (swept / "report.html").read_text()
    assert "<h1>Quality and FLOPs saved over the pruning ratio</h1>" in page and "<svg" in page


def test_results_are_kept_with_command_and_date(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    (folder / "figures").mkdir(parents=True)
    Record("criteria", "tiny", "python sweep.py experiment=criteria model=tiny", "2026-11-22", []).write(
        folder
    )
    files = [folder / "table.md", folder / "figures" / "curve.svg"]
    for file in files:
        file.write_text(file.name)
    (folder / "run.log").write_text("not of the report")
    old = tmp_path / "experiments" / "criteria" / "results" / "tiny" / "old.svg"
    old.parent.mkdir(parents=True)
    old.write_text("of an earlier sweep")
    kept = keep_results(tmp_path, folder, files)
    assert sorted(path.relative_to(kept).as_posix() for path in kept.rglob("*.*")) == [
        "README.md",
        "figures/curve.svg",
        "table.md",
    ]
    assert "python sweep.py experiment=criteria model=tiny" in (kept / "README.md").read_text()
    assert "2026-11-22" in (kept / "README.md").read_text()


def test_started_again_nothing_is_made(
    swept: Path, material: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, overrides = material
    assert sweep("experiment=ratio_curve", *overrides, "pruning.ratio=0.4") == 0
    assert "to make: none" in " ".join(capsys.readouterr().out.split())
    again = summaries(folder / "outputs")[-1]
    assert all(stage["cached"] for stage in again["stages"])


def test_the_plan_tells_what_is_shared_and_runs_nothing(
    material: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, overrides = material
    arguments = [
        "experiment=ratio_curve",
        "--dry-run",
        "pruning.ratio=0.3,0.5",
        f"paths.outputs={folder / 'plan'}",
    ]
    assert sweep(*(o for o in overrides if not o.startswith("paths.")), *arguments) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["0", "pruning.ratio=0.3", "make", "make", "make"] in [line[:5] for line in lines]
    assert ["1", "pruning.ratio=0.5", "shared", "shared", "make"] in [line[:5] for line in lines]
    assert any("arithmetic of calibrating" in " ".join(line) and line[-1] == "MFLOPs" for line in lines)
    assert not (folder / "plan" / "sweeps").exists()


def test_a_job_that_does_not_compose_stops_everything(
    material: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, overrides = material
    others = [o for o in overrides if not o.startswith("paths.")]
    assert (
        sweep("experiment=ratio_curve", *others, f"paths.outputs={folder / 'never'}", "pruning.ratio=0.4,1.5")
        == 2
    )
    error = capsys.readouterr().err
    assert "job 1 of ratio_curve (pruning.ratio=1.5" in error and "is not in [0, 1)" in error
    assert (
        sweep("experiment=ratio_curve", *others, f"paths.outputs={folder / 'never'}", "pruning.ratoi=0.4")
        == 2
    )
    assert "did you mean pruning.ratio?" in capsys.readouterr().err
    assert not (folder / "never").exists()


@pytest.mark.slow
def test_two_sweeps_at_once_calibrate_once(
    material: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One in a process of its own; the other joins it as soon as it reaches for the store."""
    overrides = [o for o in material[1] if not o.startswith("paths.")]
    common = ["evaluation=sweep", *overrides, f"paths.outputs={tmp_path}", "pruning.save_checkpoint=false"]
    folders = []
    for ratio in (0.2, 0.4):
        record = Record("both", "tiny", "", "", [[*common, f"pruning.ratio={ratio}"]])
        folders.append(new_folder(tmp_path / "sweeps", record))
    with ThreadPoolExecutor() as pool:
        other = pool.submit(launch, folders[0], [])
        while not (tmp_path / "artifacts" / "calibrate").exists() and not other.done():
            time.sleep(0.01)
        assert not other.done()
        run_jobs_here(monkeypatch)
        assert [launch(folders[1], []), other.result()] == [0, 0]
    stages = [stage for summary in summaries(tmp_path) for stage in summary["stages"]]
    made = [stage["key"] for stage in stages if not stage["cached"]]
    assert len(made) == len(set(made)) == len({stage["key"] for stage in stages})
    assert [stage["cached"] for stage in stages if stage["stage"] == "calibrate"].count(False) == 1


def test_jobs_that_never_started_are_not_forgotten(tmp_path: Path) -> None:
    """Of a plain sweep of run.py, killed in its second job of three."""
    hydra = (
        "hydra:\n  sweeper:\n    _target_: hydra._internal.core_plugins.basic_sweeper.BasicSweeper\n "
        " overrides:\n    task:\n"
    )
    (tmp_path / "multirun.yaml").write_text(hydra + "    - pruning.ratio=0.2,0.3,0.4\n")
    for number in (0, 1):
        (tmp_path / str(number) / ".hydra").mkdir(parents=True)
        (tmp_path / str(number) / ".hydra" / "overrides.yaml").write_text(f"- pruning.ratio=0.{number + 2}\n")
    corpus = {"corpus": {"_target_": "a.B"}}
    config = {"model": {}, "calibration": corpus, "score": {"_target_": "a.B"}, "pruning": {"ratio": 0.5}}
    summary = {"metrics": {}, "protocols": {}, "stages": [], "config": config}
    (tmp_path / "0" / "summary.json").write_text(json.dumps(summary))
    jobs = collect_jobs(tmp_path)
    assert [job.overrides for job in jobs] == [
        ("pruning.ratio=0.2",),
        ("pruning.ratio=0.3",),
        ("pruning.ratio=0.4",),
    ]
    assert [job.error is None for job in jobs] == [True, False, False]
    assert "was stopped" in str(jobs[1].error) and jobs[2].error == "never started"


@pytest.mark.parametrize(("name", "message"), [("missing", "is not a folder"), ("empty", "holds no jobs")])
def test_a_folder_without_a_sweep_is_refused(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=message):
        collect_jobs(tmp_path / name)


def test_the_command_line_answers_a_mistake_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "sweep.py"), "experiment=ratio_curv"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120, check=False)
    assert result.returncode == 2 and len(result.stderr.strip().splitlines()) == 1
    assert "did you mean ratio_curve?" in result.stderr


@pytest.mark.parametrize(
    "content", [b"{", b"null", b"[]", b"\xff", b'{"experiment": "criteria"}', b"[" * 100_000]
)
def test_a_damaged_record_hides_no_other_sweep(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    for name in ("2026-01-01", "2026-01-02"):
        (tmp_path / name).mkdir()
        Record("criteria", "tiny", "python sweep.py", name, []).write(tmp_path / name)
    (tmp_path / "2026-01-02" / "sweep.json").write_bytes(content)
    assert newest_sweep(tmp_path, "criteria", "tiny") == tmp_path / "2026-01-01"
    assert "2026-01-02/sweep.json' is damaged" in caplog.text and caplog.text.count("is damaged") == 1


@pytest.mark.parametrize(
    ("launcher", "extra"),
    [("joblib", "joblib"), ("submitit_local", "slurm"), ("submitit_slurm", "slurm"), ("ray", "ray")],
)
def test_a_launcher_that_is_not_installed_is_refused_with_its_extra(
    launcher: str, extra: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for plug_in in LAUNCHER_EXTRAS:
        package = f"hydra_plugins.{plug_in}"
        imported = [name for name in sys.modules if name.startswith(f"{package}.")]
        for name in (package, *imported):
            monkeypatch.setitem(sys.modules, name, None)
    assert f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text()
    assert sweep("experiment=ratio_curve", "model=tiny", "pruning.ratio=0.1", f"launcher={launcher}") == 2
    message = capsys.readouterr().err
    assert message.endswith(f"install it: pip install 'heapr[{extra}]'\n")
    assert message.count("\n") == 1


def test_options_of_the_launcher_and_the_sweeper_are_checked_before_anything_runs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["experiment=ratio_curve", "model=tiny", "pruning.ratio=0.1", "--dry-run"]
    assert sweep(*arguments, "hydra.sweeper.at_once=1") == 0
    assert sweep(*arguments, "hydra.launcher.n_jobs=2") == 2
    message = capsys.readouterr().err
    assert "'hydra.launcher.n_jobs': the launcher that is chosen has no such option" in message
    assert message.count("\n") == 1


def test_the_command_to_send_a_sweeps_own_run_is_shown(tmp_path: Path) -> None:
    """sweep.py shows warnings alone, but this."""
    told = logging.getLogger("heapr.tracking.wandb")
    before = told.level
    try:
        with pytest.raises(SystemExit):
            run_command([f"report_dir={tmp_path}"], ROOT)
        assert told.isEnabledFor(logging.INFO)
    finally:
        told.setLevel(before)
