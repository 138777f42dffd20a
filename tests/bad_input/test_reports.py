"""Damaged folders of sweeps, wrong command lines of sweep.py and prefetch, wrong launchers and processes."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest

from heapr import prefetch
from heapr.artifacts import read_details, read_kept, read_super_experts
from tests.bad_input.refusals import line_of, refused, refused_call
from tests.command import ROOT, Completed, run_here
from tests.experiment import write_model, write_texts

Change = Callable[[Path], object]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one job of a sweep that finished, and its artifacts."""
    folder = tmp_path_factory.mktemp("finished")
    write_model(folder / "model")
    settings = [
        "model=hf",
        f"model.path={folder / 'model'}",
        "model.dtype=float32",
        "tracking=none",
        *write_texts(folder),
    ]
    quick = [
        "evaluation=quick",
        *(
            f"evaluation.{name}=null"
            for name in ("zero_shot", "efficiency", "fidelity", "throughput", "truth")
        ),
        "pruning.save_checkpoint=false",
    ]
    settings = [
        setting for setting in settings if not setting.startswith("evaluation") or "corpora" in setting
    ]
    arguments = ["-m", *settings, "evaluation/corpora=[text_files]", *quick, "pruning.ratio=0.25,0.5"]
    window = "evaluation.perplexity.window=32"
    result = run_here([sys.executable, str(ROOT / "run.py"), *arguments, window], folder)
    assert result.returncode == 0, result.stderr
    (sweep,) = (folder / "outputs" / "sweeps").iterdir()
    record = {
        "experiment": "ratio_curve",
        "version": "tiny",
        "command": "x",
        "date": "2026-01-01",
        "jobs": [["a=1"], ["a=2"]],
    }
    (sweep / "sweep.json").write_text(json.dumps(record))
    return sweep


def report_of(folder: Path) -> Completed:
    return run_here([sys.executable, str(ROOT / "sweep.py"), f"report_dir={folder}"], folder.parent)


def content(name: str, text: str | bytes) -> Change:
    encoded = text.encode() if isinstance(text, str) else text
    return lambda folder: (folder / name).write_bytes(encoded)


def summary(change: Callable[[dict], object]) -> Change:
    """Change the summary of job 0."""

    def rewrite(folder: Path) -> None:
        path = folder / "0" / "summary.json"
        before = json.loads(path.read_text())
        change(before)
        path.write_text(json.dumps(before))

    return rewrite


def without_record(change: Change) -> Change:
    return lambda folder: ((folder / "sweep.json").unlink(), change(folder))


DEEP = "[" * 100_000
DAMAGES: dict[str, tuple[Change, str]] = {
    "record is a list": (content("sweep.json", "[]"), "sweep.json"),
    "record is null": (content("sweep.json", "null"), "sweep.json"),
    "record is no JSON": (content("sweep.json", "{"), "sweep.json"),
    "record is empty": (content("sweep.json", ""), "sweep.json"),
    "record is no UTF-8": (content("sweep.json", b"\xff"), "sweep.json"),
    "record is too deep": (content("sweep.json", DEEP), "sweep.json"),
    "record lacks jobs": (content("sweep.json", '{"experiment": "a"}'), "sweep.json"),
    "record has an unknown key": (content("sweep.json", '{"nonsense": 1}'), "sweep.json"),
    "record's jobs are a number": (content("sweep.json", '{"experiment":"a","version":"tiny","command":"","date":"","jobs":3}'), "sweep.json"),
    "record's jobs are numbers": (content("sweep.json", '{"experiment":"a","version":"tiny","command":"","date":"","jobs":[3]}'), "sweep.json"),
    "record's report is text": (content("sweep.json", '{"experiment":"a","version":"tiny","command":"","date":"","jobs":[["a=1"]],"report":"x"}'), "sweep.json"),
    "record's title is a list": (content("sweep.json", '{"experiment":"a","version":"tiny","command":"","date":"","jobs":[["a=1"]],"title":[]}'), "sweep.json"),
    "summary is a list": (content("0/summary.json", "[]"), "summary.json"),
    "summary is null": (content("0/summary.json", "null"), "summary.json"),
    "summary is no JSON": (content("0/summary.json", "{"), "summary.json"),
    "summary is empty": (content("0/summary.json", ""), "summary.json"),
    "summary is no UTF-8": (content("0/summary.json", b"\xff"), "summary.json"),
    "summary is an empty object": (content("0/summary.json", "{}"), "summary.json"),
    "summary has no metrics": (summary(lambda value: value.pop("metrics")), "summary.json"),
    "metrics are a list": (summary(lambda value: value.update(metrics=[])), "summary.json"),
    "metrics of a model are text": (summary(lambda value: value["metrics"].update(dense="x")), "summary.json"),
    "a metric is text": (summary(lambda value: value["metrics"]["dense"].update({"perplexity/text_files": "x"})), "summary.json"),
    "a metric is null": (summary(lambda value: value["metrics"]["pruned"].update({"perplexity/text_files": None})), "summary.json"),
    "configuration is a list": (summary(lambda value: value.update(config=[])), "summary.json"),
    "configuration is empty": (summary(lambda value: value.update(config={})), "summary.json"),
    "configuration has no model": (summary(lambda value: value["config"].pop("model")), "summary.json"),
    "a ratio is text": (summary(lambda value: value["config"]["pruning"].update(ratio="x")), "summary.json"),
    "score has no target": (summary(lambda value: value["config"].update(score={})), "summary.json"),
    "stages are text": (summary(lambda value: value.update(stages="x")), "summary.json"),
    "stages are numbers": (summary(lambda value: value.update(stages=[3])), "summary.json"),
    "a stage has no path": (summary(lambda value: [one.pop("path") for one in value["stages"]]), "summary.json"),
    "protocols are a list": (summary(lambda value: value.update(protocols=[])), "summary.json"),
    "overrides are no YAML": (without_record(content("0/.hydra/overrides.yaml", "[")), "overrides.yaml"),
    "overrides are no UTF-8": (without_record(content("0/.hydra/overrides.yaml", b"\xff\xfe\x00")), "overrides.yaml"),
    "multirun is no YAML": (without_record(content("multirun.yaml", "{")), "multirun.yaml"),
    "multirun is a list": (without_record(content("multirun.yaml", "[]")), "multirun.yaml"),
    "multirun is code": (without_record(content("multirun.yaml", "!!python/object/apply:os.system [ls]")), "multirun.yaml"),
    "multirun's task is no override": (without_record(content("multirun.yaml", "hydra: {sweeper: {_target_: BasicSweeper}, overrides: {task: ['a=[']}}")), "multirun.yaml"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_folder_of_a_sweep(name: str, finished: Path, tmp_path: Path) -> None:
    """Its path is named; or the damaged job counts as failed, with the reason, and the others are reported."""
    outputs = tmp_path / "outputs"
    shutil.copytree(finished.parents[1], outputs)
    folder = outputs / "sweeps" / finished.name
    for path in folder.glob("*/summary.json"):
        path.write_text(path.read_text().replace(str(finished.parents[1]), str(outputs)))
    change, part = DAMAGES[name]
    change(folder)
    with mock.patch("heapr.report.sweep.report.FIGURES", {}):
        result = report_of(folder)
    if result.returncode == 2:
        assert part in line_of(result)
    else:
        assert part in result.stdout + result.stderr and "Traceback" not in result.stderr
        assert (folder / "report.html").is_file()


def test_damaged_files_of_artifacts(tmp_path: Path) -> None:
    for name, read in (
        ("plan.safetensors", read_kept),
        ("details.json", read_details),
        ("allocation.json", read_super_experts),
    ):
        for text in (b"", b"{", b"[]", b"null", b"\xff", b"\0" * 40, DEEP.encode()):
            (tmp_path / name).write_bytes(text)
            assert f"{name}' is damaged" in refused_call(lambda read=read: read(tmp_path))


SWEEPS = [
    ("experiment=nonsense", "unknown experiment 'nonsense'"),
    ("experiment=../ratio_curve", "unknown experiment"),
    ("experiment=", "unknown experiment ''"),
    ("", "give either experiment=<name> or report_dir=<folder>"),
    ("report_dir=/no/such/folder", "is not a folder"),
    (f"report_dir=/{'a' * 300}", "longer than a path may be"),
    ("report_dir=", "report_dir"),
    ("experiment=ratio_curve report_dir=x", "give either"),
    ("experiment=ratio_curve experiment=main_table", "experiment is given twice"),
    ("experiment=ratio_curve model=tiny pruning.ratio", "neither an override"),
    ("experiment=ratio_curve model=tiny pruning.ratio=2", "is not in [0, 1)"),
    ("experiment=ratio_curve model=tiny pruning.raito=0.2", "did you mean pruning.ratio?"),
    ("experiment=ratio_curve model=tiny +pruning.raito=0.2", "did you mean pruning.ratio?"),
    ("experiment=ratio_curve model=tiny launcher=nonsense", "nonsense"),
    ("experiment=ratio_curve model=tiny hydra.launcher._target_=os.system", "hydra.launcher._target_='os.system'"),
    ("experiment=ratio_curve model=tiny score._target_=os.system", "score._target_='os.system'"),
    ("experiment=ratio_curve model=tiny results=perhaps", "neither true nor false"),
    ("experiment=ratio_curve model=tiny dry_run=true", "--dry-run"),
    ("experiment=ratio_curve model=tiny --nonsense", "neither an override"),
    ("experiment=ratio_curve model=tiny paths.outputs=", "paths.outputs"),
    ("experiment=ratio_curve model=tiny report_only=true paths.outputs=/no/such", "holds no sweep"),
    ("experiment=ratio_curve model=tiny 'a", "'a"),
    ("experiment=ratio_curve model=tiny runtime.device=cuda:99 pruning.ratio=0.3", "no job of ratio_curve can run"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "part"), SWEEPS)
def test_a_wrong_argument_of_sweep_py(arguments: str, part: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "sweep.py"), *arguments.split()]
    assert part in line_of(_last_line_only(run_here(command, tmp_path)))


def _last_line_only(result: Completed) -> Completed:
    """Without the notes that a forecast logs before."""
    return Completed(result.args, result.returncode, result.stdout, result.stderr.strip().splitlines()[-1])


STORES = [
    ("", "the following arguments are required"),
    ("nonsense", "invalid choice: 'nonsense'"),
    ("ls pruning.ratio=3", "unrecognized arguments"),
    ("show", "the following arguments are required: key"),
    ("ls --outputs", "expected one argument"),
    ("ls --outputs=", "a path is empty"),
    ("ls --outputs /no/such", "'/no/such/artifacts' is not there"),
]


@pytest.mark.parametrize(("arguments", "part"), STORES)
def test_a_wrong_argument_of_the_store(arguments: str, part: str, tmp_path: Path) -> None:
    assert part in line_of(run_here([sys.executable, "-m", "heapr.store", *arguments.split()], tmp_path))


PREFETCHES = [
    ("pruning.ratio=2", "is not in [0, 1)"),
    ("score=[heapr,fisher]", "score takes one option"),
    ("score._target_=os.system", "score._target_='os.system'"),
    (
        "model.path=/no/such/folder evaluation=none calibration=numpydocs calibration.corpus.package=email",
        "could not be fetched: model /no/such/folder",
    ),
    ("paths.outputs=", "paths.outputs"),
    ("nonsense", "nonsense"),
    ("evaluation.zero_shot.tasks=[nonsense]", "zero-shot task 'nonsense' is unknown"),
]


@pytest.mark.parametrize(("arguments", "part"), PREFETCHES)
def test_a_wrong_argument_of_prefetch(arguments: str, part: str) -> None:
    stderr, code = io.StringIO(), 0
    with contextlib.redirect_stderr(stderr):
        try:
            prefetch.main(arguments.split())
        except SystemExit as stopped:
            code = int(stopped.code or 0)
    assert part in line_of(_last_line_only(Completed([], code, "", stderr.getvalue())))


@contextlib.contextmanager
def variables(**values: str) -> Iterator[None]:
    with mock.patch.dict("os.environ", values):
        yield


PROCESSES = [
    (
        {"WORLD_SIZE": "2", "RANK": "x", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
        "RANK",
    ),
    ({"WORLD_SIZE": "-1", "RANK": "0", "LOCAL_RANK": "0"}, "WORLD_SIZE"),
    (
        {"WORLD_SIZE": "2", "RANK": "5", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
        "RANK",
    ),
    (
        {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "5", "SLURM_STEP_NODELIST": "a"},
        "SLURM_PROCID=5 is not below",
    ),
    ({"WORLD_SIZE": "2", "RANK": "0"}, "there is no MASTER_ADDR"),
    ({"WANDB_MODE": "nonsense"}, "WANDB_MODE='nonsense' is unknown"),
]


@pytest.mark.parametrize(("environment", "part"), PROCESSES)
def test_a_wrong_environment(environment: dict[str, str], part: str, tmp_path: Path) -> None:
    with variables(**environment):
        text = ["calibration=numpydocs", "calibration.corpus.package=email", "calibration.num_samples=2"]
        assert part in refused(tmp_path, *text, "evaluation=none")


@pytest.mark.parametrize(
    ("argument", "part"),
    [
        ("score._target_=os.system", "score._target_='os.system'"),
        ("model.path=/no/such/folder", "no such folder"),
    ],
)
def test_answers_come_before_torch_is_imported(argument: str, part: str, tmp_path: Path) -> None:
    """In a process of its own: what the schema or the targets refuse needs no torch, lm-eval or transformers."""
    ask = "import atexit, sys; atexit.register(lambda: print(*sys.modules)); from heapr.main import main; main()"
    command = [sys.executable, "-c", ask, argument, "evaluation.zero_shot.tasks=[nonsense]"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60, check=False)
    assert part in line_of(result)
    modules = set(result.stdout.split())
    assert "omegaconf" in modules
    assert modules.isdisjoint({"torch", "transformers", "lm_eval", "numpy", "wandb", "datasets"})
