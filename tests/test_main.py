"""The command line: exit codes, one line for mistakes, help, and sweeps; in processes of their own where that is the point."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.command import Completed, run_py, run_py_here
from tests.experiment import write_model, write_texts
from tests.tiny import tiny_qwen3_moe


def assert_refused(result: Completed, message: str) -> None:
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "pruning.ratoi=0.3",
            "unknown key 'pruning.ratoi'; did you mean pruning.ratio? known here: budget, form, min_expert_ratio, min_layer_ratio, ",
        ),
        ("evaluation.perplexity.windo=3", "did you mean evaluation.perplexity.window?"),
        ("prunning.ratio=0.3", "did you mean pruning?"),
        ("pruning.ratio=lots", "pruning.ratio"),
        ("pruning.ratio=1.5", "pruning.ratio=1.5 is not in [0, 1)"),
        ("score=haepr", "unknown option 'score/haepr'; did you mean heapr? known options of score: activation, camera, fisher,"),
        ("evaluation/corpora=[wikitex2]", "unknown option 'evaluation/corpora/wikitex2'; did you mean wikitext2?"),
        ("model.path=/no/such/folder", "no such folder"),
        ("model.path=someone/some-model", "the hub cannot be reached"),
        ("model=qwen3_30b_a3b dry_run=true", "the hub cannot be reached"),
        ("paths.outputs=/dev/null/outputs", "cannot write '/dev/null/outputs"),
        ("calibration.num_samples=", "calibration.num_samples"),
        ("model=hf", "no value for model.path"),
        ("score=random score.sede=3", "did you mean score.seed?"),
        ("pruning.repair.ridge=0.1", "an override sets a field of what is null, such as pruning.repair.ridge"),
        ("pruning/repair=joint pruning.repair.ridge=-1", "pruning.repair.ridge=-1 is not above 0"),
        ("calibration=text_files calibration.corpus.path=x", "did you mean calibration.corpus.paths?"),
        ("calibration=text_files", "text_files has no paths"),
        ("paths.outputs=/proc/outputs", "cannot write '/proc/outputs"),
    ],
)
def test_a_mistake_costs_one_line_and_exit_code_2(tmp_path: Path, override: str, message: str) -> None:
    assert_refused(run_py_here(*override.split(" "), "tracking=none", folder=tmp_path), message)


def test_a_process_has_no_other_words_for_a_mistake(tmp_path: Path) -> None:
    assert_refused(run_py("pruning.ratoi=0.3", folder=tmp_path), "did you mean pruning.ratio?")


def test_help_shows_groups_and_fields(tmp_path: Path) -> None:
    result = run_py_here("--help", folder=tmp_path)
    assert result.returncode == 0
    for text in (
        "score: activation, camera, fisher, frequency, heapr, heapr_expert, heapr_sum, magnitude, random, reap, taylor",
        "ratio: 0.25",
        "python run.py -m pruning.ratio=0.2,0.3,0.4",
    ):
        assert text in result.stdout


def test_a_dry_run_prints_the_plan_from_config_json_alone_and_makes_nothing(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    tiny_qwen3_moe().config.save_pretrained(tmp_path / "model")
    overrides = ["model=hf", f"model.path={tmp_path / 'model'}", "model.trust_remote_code=true", "runtime.device_map=auto", "dry_run=true"]
    result = run_py(*overrides, *write_texts(tmp_path), folder=tmp_path, COLUMNS="80", PYTHONPROFILEIMPORTTIME="1")
    assert result.returncode == 0, result.stderr
    assert "Qwen3MoeForCausalLM" in result.stdout and "to be made" in result.stdout and "holds no weights" in result.stdout
    imports = [line.split("|")[-1].strip() for line in result.stderr.splitlines() if line.startswith("import time:")]
    assert "torch" in imports and not any(name.startswith("wandb") for name in imports)
    assert len(imports) == len(result.stderr.splitlines()), "nothing else is said"
    assert not any((tmp_path / "outputs" / "artifacts").iterdir())


def test_a_sweep_runs_every_job_and_shares_calibration(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    overrides = ["model=hf", f"model.path={tmp_path / 'model'}", "model.dtype=float32", "tracking=none", *write_texts(tmp_path)]
    result = run_py_here("-m", "pruning.ratio=0.2,0.4", *overrides, folder=tmp_path)
    assert result.returncode == 0, result.stderr
    (sweep,) = (tmp_path / "outputs" / "sweeps").iterdir()
    summaries = [json.loads((sweep / job / "summary.json").read_text()) for job in ("0", "1")]
    assert [s["config"]["pruning"]["ratio"] for s in summaries] == [0.2, 0.4]
    assert [s["stages"][0]["cached"] for s in summaries] == [False, True]
    assert "dense against pruned" in result.stdout
    assert not list((tmp_path / "outputs").glob("wandb*"))  # tracking=none


def test_one_bad_job_of_a_sweep_does_not_stop_the_others(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    overrides = ["model=hf", f"model.path={tmp_path / 'model'}", "model.dtype=float32", "tracking=none", *write_texts(tmp_path)]
    result = run_py_here("-m", "pruning.ratio=2,0.4", *overrides, folder=tmp_path)
    assert result.returncode == 2
    assert "pruning.ratio=2.0 is not in [0, 1)" in result.stderr
    (sweep,) = (tmp_path / "outputs" / "sweeps").iterdir()
    assert (sweep / "1" / "summary.json").exists()


def test_home_folder_in_outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in those that Hydra makes; no folder is called ~."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "work").mkdir()
    write_model(tmp_path / "home" / "model")
    write_texts(tmp_path / "home")
    settings = [
        "model=hf", "model.path='~/model'", "model.dtype=float32", "calibration=text_files", "calibration.corpus.paths=['~/train.txt']",
        "calibration.num_samples=6", "calibration.sequence_length=32", "tracking=none", "evaluation=none", "paths.outputs='~/x'",
    ]  # fmt: skip
    result = run_py_here(*settings, folder=tmp_path / "work")
    assert result.returncode == 0, result.stderr
    many = run_py_here("-m", *settings, "pruning.ratio=0.25,0.5", folder=tmp_path / "work")
    assert many.returncode == 0, many.stderr
    assert list((tmp_path / "work").iterdir()) == []
    assert sorted(path.name for path in (tmp_path / "home" / "x").iterdir()) == ["artifacts", "runs", "sweeps"]
    assert len(list((tmp_path / "home" / "x" / "artifacts" / "calibrate").glob("*/manifest.json"))) == 1
