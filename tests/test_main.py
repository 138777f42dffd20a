"""The command line: exit codes, one line for mistakes, help, and sweeps; in processes of their own where that
is the point."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.bad_input.refusals import FILES, composed_once, weights_stay_away
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
            (
                "unknown key 'pruning.ratoi'; did you mean pruning.ratio? known here: budget, form,"
                " protect_super_experts, protected_layers, push_public, push_to, ratio, "
            ),
        ),
        ("evaluation.perplexity.windo=3", "did you mean evaluation.perplexity.window?"),
        ("prunning.ratio=0.3", "did you mean pruning?"),
        ("ratio=0.3", "unknown key 'ratio'; did you mean pruning.ratio?"),
        (
            "evaluation.tasks=[piqa]",
            "unknown key 'evaluation.tasks'; did you mean evaluation.zero_shot.tasks?",
        ),
        ("pruning.repair=joint", "options of a group are chosen with a slash; write pruning/repair=joint"),
        ("launcher=joblib", "write -m hydra/launcher=<name>; launcher=<name> is for sweep.py"),
        ("--dry-run", "unknown option '--dry-run'; fields are set without dashes (dry_run=...)"),
        ("pruning.ratio=0.2,1.5 -m hydra/launcher=ray", "pip install 'heapr[ray]'"),
        (
            "hydra.launcher.n_jobs=2 -m",
            "'hydra.launcher.n_jobs': the launcher that is chosen has no such option;",
        ),
        ("pruning.ratio=lots", "pruning.ratio"),
        ("pruning.ratio=1.5", "pruning.ratio=1.5 is not in [0, 1)"),
        (
            "score=haepr",
            (
                "unknown option 'score/haepr'; did you mean heapr? known options of score: activation,"
                " camera, fisher,"
            ),
        ),
        (
            "evaluation/corpora=[wikitex2]",
            "unknown option 'evaluation/corpora/wikitex2'; did you mean wikitext2?",
        ),
        (
            "corpus=c4",
            (
                "options of 'corpus' are chosen where they are used; write calibration=<name> to calibrate"
                " on one"
            ),
        ),
        ("model.path=/no/such/folder", "no such folder"),
        ("model.path=someone/some-model", "the hub cannot be reached"),
        ("model=qwen3_30b_a3b dry_run=true", "the hub cannot be reached"),
        ("paths.outputs=/dev/null/outputs", "cannot write '/dev/null/outputs"),
        ("calibration.num_samples=", "calibration.num_samples"),
        ("model=hf", "no value for model.path"),
        ("score=random score.sede=3", "did you mean score.seed?"),
        (
            "pruning.repair.ridge=0.1",
            "an override sets a field of something that is null, such as pruning.repair.ridge",
        ),
        ("pruning/repair=joint pruning.repair.ridge=-1", "pruning.repair.ridge=-1 is not above 0"),
        ("calibration=text_files calibration.corpus.path=x", "did you mean calibration.corpus.paths?"),
        ("calibration=text_files", "text_files has no paths"),
        ("paths.outputs=/proc/outputs", "cannot write '/proc/outputs"),
        (
            "paths.outputs=/tmp/é",
            """argument 'paths.outputs=/tmp/é': é in a value must be inside quotes; write 'paths.outputs="/tmp/é"'""",
        ),
        (
            "hydra.run.dir=a(b",
            (
                "argument 'hydra.run.dir=a(b': ( in a value must be inside quotes; write"
                " 'hydra.run.dir=\"a(b\"'"
            ),
        ),
        ("-m pruning.ratio=0.2,#", """write 'pruning.ratio=0.2,"#"'"""),
        (
            "paths.outputs=/tmp/a,b",
            "argument 'paths.outputs=/tmp/a,b' has a comma; write 'paths.outputs=\"/tmp/a,b\"' for one value",
        ),
        ("pruning.ratio=int(x)", "argument 'pruning.ratio=int(x)': ValueError while evaluating 'int(x)'"),
        (
            "score=null",
            "argument 'score=null': null is not the name of an option; known options of score: activation,",
        ),
        ("=3", "argument '=3': '' cannot be the name of a field"),
        ("+experiment=criteria", "are run by sweep.py; write python sweep.py experiment=<name>"),
        ("experiment=criteria", "are run by sweep.py; write python sweep.py experiment=<name>"),
        ("+foo=1", "unknown key 'foo'; known here: calibration, "),
        ("++prunning=1", "unknown key 'prunning'; did you mean pruning?"),
        ("+pruning.foo=1", "unknown key 'pruning.foo'; known here: budget, form, "),
        ("+pruning.raito=0.5", "unknown key 'pruning.raito'; did you mean pruning.ratio?"),
        ("+ratio=0.5", "unknown key 'ratio'; did you mean pruning.ratio?"),
        ("+corpus=c4", "options of 'corpus' are chosen where they are used"),
        ("+pruning.ratio=0.5", "a + adds what is not there; write pruning.ratio=0.5"),
        ("+score=fisher", "a + adds what is not there; write score=fisher"),
        ("~pruning.raito", "unknown key 'pruning.raito'; did you mean pruning.ratio?"),
        ("--experimental-rerun runs/1/.hydra/config.pickle", "write --config-path=runs/1/.hydra"),
        ("--config-path runs/1", "--config-path=runs/1 is not a folder; give the folder of a run"),
        (
            "objective=kl_to_dense/pydoc",
            "objective=kl_to_dense/pydoc is not measured here; did you mean kl_to_dense/pydocs? with this",
        ),
        ("objective=perplexity", "a run can return: atomic_experts_removed_ratio, perplexity/pydocs, "),
    ],
)
def test_a_mistake_costs_one_line_and_exit_code_2(tmp_path: Path, override: str, message: str) -> None:
    arguments = [*override.split(" "), "tracking=none"]
    with weights_stay_away(), composed_once(arguments), FILES.read_once():
        assert_refused(run_py_here(*arguments, folder=tmp_path), message)


def test_a_process_has_no_other_words_for_a_mistake(tmp_path: Path) -> None:
    assert_refused(run_py("pruning.ratoi=0.3", folder=tmp_path), "did you mean pruning.ratio?")


def test_help_shows_groups_and_fields(tmp_path: Path) -> None:
    result = run_py_here("--help", folder=tmp_path)
    assert result.returncode == 0
    for text in (
        (
            "score: activation, camera, fisher, frequency, heapr, heapr_expert, heapr_sum, magnitude, random,"
            " reap, taylor"
        ),
        "ratio: 0.25",
        "heapr -m pruning.ratio=0.2,0.3,0.4",
    ):
        assert text in result.stdout


@pytest.mark.slow
def test_a_dry_run_prints_the_plan_from_config_json_alone_and_makes_nothing(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    tiny_qwen3_moe().config.save_pretrained(tmp_path / "model")
    overrides = [
        "model=hf",
        f"model.path={tmp_path / 'model'}",
        "model.trust_remote_code=true",
        "runtime.device_map=auto",
        "dry_run=true",
    ]
    result = run_py(
        *overrides, *write_texts(tmp_path), folder=tmp_path, COLUMNS="80", PYTHONPROFILEIMPORTTIME="1"
    )
    assert result.returncode == 0, result.stderr
    assert (
        "Qwen3MoeForCausalLM" in result.stdout
        and "to be made" in result.stdout
        and "holds no weights" in result.stdout
    )
    imports = [
        line.split("|")[-1].strip() for line in result.stderr.splitlines() if line.startswith("import time:")
    ]
    assert "torch" in imports and not any(name.startswith("wandb") for name in imports)
    assert len(imports) == len(result.stderr.splitlines()), "nothing else is said"
    assert not any((tmp_path / "outputs" / "artifacts").iterdir())


@pytest.mark.parametrize(
    "variables",
    [
        pytest.param({"PYTHONIOENCODING": "ascii"}, id="ascii"),
        pytest.param({"LC_ALL": "C"}, id="C", marks=pytest.mark.slow),
        pytest.param({"PYTHONIOENCODING": "latin-1"}, id="latin-1", marks=pytest.mark.slow),
    ],
)
def test_a_run_ends_well_whatever_the_console_can_print(tmp_path: Path, variables: dict[str, str]) -> None:
    """A path with letters that the console lacks: escaped there, whole in files."""
    folder = tmp_path / "thèse Ω"
    write_model(folder / "model")
    overrides = [
        f'model.path="{folder / "model"}"',
        f'paths.outputs="{folder / "outputs"}"',
        "model=hf",
        "model.dtype=float32",
    ]
    texts = [
        re.sub(r"=\[(.*)\]", r'=["\1"]', override) if "Ω" in override else override
        for override in write_texts(folder)
    ]
    quick = [
        "evaluation.fidelity=null",
        "evaluation.throughput=null",
        "evaluation.truth=null",
        "tracking=none",
    ]
    result = run_py(*overrides, *texts, *quick, folder=tmp_path, **variables)
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
    # Python makes UTF-8 of C.
    assert r"\u03a9/outputs/artifacts" in result.stdout or "thèse Ω/outputs/artifacts" in result.stdout
    (run,) = (folder / "outputs" / "runs").iterdir()
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert summary["config"]["paths"]["outputs"] == str(folder / "outputs")
    assert "thèse Ω" in (run / "run.log").read_text(encoding="utf-8")


def test_paths_are_whole_where_there_is_no_screen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a pipe, whatever width is claimed: of the run, and of a plan."""
    folder = (
        tmp_path
        / ("a_folder_with_a_name_that_is_longer_than_a_line_of_eighty_letters_" * 2)
        / "and one with blanks"
    )
    write_model(folder / "model")
    overrides = [
        "model=hf",
        f'model.path="{folder / "model"}"',
        f'paths.outputs="{folder / "outputs"}"',
        "model.dtype=float32",
    ]
    texts = [
        re.sub(r"=\[(.*)\]", r'=["\1"]', override) if "blanks" in override else override
        for override in write_texts(folder)
    ]
    texts = [text for text in texts if not text.startswith("evaluation")]
    monkeypatch.setenv("COLUMNS", "60")
    result = run_py_here(*overrides, *texts, "evaluation=none", "tracking=none", folder=tmp_path)
    assert result.returncode == 0, result.stderr
    (run,) = (folder / "outputs" / "runs").iterdir()
    (checkpoint,) = (folder / "outputs" / "artifacts" / "prune").glob("*/checkpoint")
    lines = result.stdout.splitlines()
    assert f"this run:   {run}" in lines and f"checkpoint: {checkpoint}" in lines
    plan = run_py_here(*overrides, *texts, "evaluation=none", "dry_run=true", folder=tmp_path)
    assert f"model: {folder / 'model'}" in plan.stdout.splitlines()


def test_a_sweep_runs_every_job_and_shares_calibration(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    overrides = [
        "model=hf",
        f"model.path={tmp_path / 'model'}",
        "model.dtype=float32",
        "tracking=none",
        *write_texts(tmp_path),
    ]
    result = run_py_here("-m", "pruning.ratio=0.2,0.4", *overrides, folder=tmp_path)
    assert result.returncode == 0, result.stderr
    (sweep,) = (tmp_path / "outputs" / "sweeps").iterdir()
    summaries = [json.loads((sweep / job / "summary.json").read_text()) for job in ("0", "1")]
    assert [s["config"]["pruning"]["ratio"] for s in summaries] == [0.2, 0.4]
    assert [s["stages"][0]["cached"] for s in summaries] == [False, True]
    assert "dense vs. pruned" in result.stdout
    assert not list((tmp_path / "outputs").glob("wandb*"))  # tracking=none


def test_one_bad_job_of_a_sweep_does_not_stop_the_others(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    overrides = [
        "model=hf",
        f"model.path={tmp_path / 'model'}",
        "model.dtype=float32",
        "tracking=none",
        *write_texts(tmp_path),
    ]
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
    assert sorted(path.name for path in (tmp_path / "home" / "x").iterdir()) == [
        "artifacts",
        "runs",
        "sweeps",
    ]
    assert len(list((tmp_path / "home" / "x" / "artifacts" / "calibrate").glob("*/manifest.json"))) == 1
