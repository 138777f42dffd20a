"""What a configuration file from elsewhere can make heapr do: nothing but what its fields say."""

from __future__ import annotations

import json
import logging
import re
import sys
from pathlib import Path

import pytest

from heapr import composition, secrets
from heapr.artifacts import MANIFEST
from heapr.errors import ConfigError
from heapr.plugins import plug_in
from heapr.sweep.collect import collect_jobs
from heapr.targets import check_targets
from tests.bad_input.refusals import line_of, refused
from tests.command import ROOT, run_here, run_py_here
from tests.experiment import CONF, compose_experiment, write_model, write_texts

SECRET = "correct-horse-battery-staple"
TOKEN = "hf_" + "aB3" * 11

MARK = "ran.txt"  # written where code of a configuration file ran


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of somebody else's, which leaves a mark when it is imported or called."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "foreign_package.py").write_text(
        f"""from pathlib import Path
Path({str(tmp_path / MARK)!r}).write_text("imported")
from heapr.score.data_free import Magnitude
class Mine(Magnitude):
    pass
class Other:
    pass
def call(*arguments, **named):
    Path({str(tmp_path / MARK)!r}).write_text("called")
"""
    )
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "foreign_package", raising=False)
    return folder


TARGETS = [
    ("++score={_target_:os.system,command:ls}", "score._target_='os.system'"),
    ("++score={_target_:heapr.files.os.system}", "score._target_='heapr.files.os.system'"),
    ("++score._target_=subprocess.Popen", "is not a criterion of heapr.score"),
    ("++score._target_=foreign_package.Mine", "plugins.allow=[foreign_package]"),
    ("++score._target_=heapr.score.data_free.Magnitude.__init__", "_target_"),
    ("++score._target_=heapr.text.corpora.PyDocs", "is not a criterion of heapr.score"),
    ("++score._target_=heapr.score.criterion.mean_over_routed", "is not a criterion"),
    ("++score._target_=heapr.score.nothing.Nothing", "is not a criterion"),
    ("++score._target_=heapr.score..data_free.Magnitude", "is not the name of a class"),
    ("++score._target_=3", "is not the name of a class"),
    ("++score._target_=null", "is not the name of a class"),
    ("++score._target_=[os,system]", "is not the name of a class"),
    ("++score._target_=heapr.score.criterion.Unit", "is not a criterion"),
    ("pruning/repair=joint pruning.repair._target_=heapr.pruning.budget.Budget", "is not a way to repair"),
    ("pruning/repair=joint pruning.repair._target_=foreign_package.call", "pruning.repair._target_='foreign_package.call'"),
    ("++pruning.repair={_target_:foreign_package.call}", "something that is null"),
    ("++calibration.corpus={_target_:foreign_package.call}", "is not a corpus of heapr.text"),
    ("++calibration.corpus={_target_:heapr.text.reader.Source}", "is not a corpus"),
    ("++calibration.corpus={_target_:heapr.text.corpora._Docstrings}", "is not a corpus of heapr.text"),
    ("++score.alpha={_target_:heapr.score.data_free.Magnitude,x:{_target_:foreign_package.call}}", "score.alpha.x._target_"),
    ("++evaluation.corpora.x={_target_:foreign_package.call}", "evaluation.corpora.x._target_"),
    ("++evaluation.x={_target_:foreign_package.call}", "is not a measurement of heapr.evaluation"),
    ("++evaluation.x={_target_:heapr.evaluation.two_stage.GradientMatrices}", "is not a measurement"),
    ("++evaluation.perplexity.window={_target_:foreign_package.call}", "evaluation.perplexity.window._target_"),
    ("calibration=mixture ++calibration.corpus.parts.x={weight:1,corpus:{_target_:foreign_package.call}}", "parts.x.corpus._target_"),
    ("++calibration.corpus.x=[{y:{_target_:foreign_package.call}}]", "calibration.corpus.x.0.y._target_"),
    ("plugins.allow=[../x]", "is not the name of a package"),
    ("plugins.allow=[foreign_package] score._target_=foreign_package.call", "is not a class"),
    ("plugins.allow=[foreign_package] score._target_=foreign_package.Other", "is not a criterion: it has no __call__"),
    ("plugins.allow=[foreign_package] score._target_=foreign_package.Nothing", "cannot be imported"),
    ("plugins.allow=[foreign_package] score._target_=foreign_package_too.Mine", "plugins.allow=[foreign_package_too]"),
    ("+hydra.callbacks.x={_target_:foreign_package.call}", "hydra.callbacks.x._target_"),
    ("-m hydra.launcher._target_=foreign_package.call", "hydra.launcher._target_"),
    ("-m hydra.sweeper._target_=foreign_package.call", "hydra.sweeper._target_"),
    ("+hydra.job_logging.handlers.x={class:foreign_package.call}", "hydra.job_logging.handlers.x.class"),
    ("+hydra.job_logging.handlers.console.level=ext://foreign_package.call", "hydra"),
    ("+hydra.hydra_logging.handlers.x={class:foreign_package.call}", "hydra"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "part"), TARGETS)
def test_a_target_is_checked_before_anything_is_imported_or_called(
    arguments: str, part: str, tmp_path: Path, package: Path
) -> None:
    dry_run = f"dry_run={str(len(arguments) % 2 == 0).lower()}"  # it makes no difference
    line = refused(tmp_path, *arguments.split(" "), dry_run, "tracking=none")
    assert part in line
    if "allow=[foreign_package]" not in arguments:
        assert not (tmp_path / MARK).exists()
    assert not (tmp_path / "outputs" / "artifacts").exists() or "allow" in arguments


FILES = {  # content of a file in a folder of --config-dir, and what the refusal names
    "score: {_target_: foreign_package.Mine}\nplugins: {allow: [foreign_package]}": "plugins.allow=",
    "model: {trust_remote_code: true}": "model.trust_remote_code=True comes from a file",
    "hydra: {callbacks: {x: {_target_: foreign_package.call}}}": "hydra.callbacks.x._target_",
    "hydra: {output_subdir: /tmp}": "hydra.output_subdir=/tmp leads out of the run's folder",
    "hydra: {sweep: {subdir: ../../x}}": "hydra.sweep.subdir=../../x leads out",
    "hydra: {job: {env_set: {PATH: /tmp}}}": "hydra.job.env_set runs commands",
    "hydra: {sweeper: {params: {model.trust_remote_code: 'true'}}}": "model.trust_remote_code",
    "hydra: {sweeper: {params: {plugins.allow: '[foreign_package]'}}}": "plugins.allow",
    "hydra: {overrides: {task: ['plugins.allow=[foreign_package]']}}\nplugins: {allow: [foreign_package]}": "plugins.allow",
    "hydra: {job_logging: {handlers: {console: {class: foreign_package.call}}}}": "hydra.job_logging",
    "evaluation: {zero_shot: {include_path: /tmp}}": "include_path",
    "model:\n  name: ${oc.env:PLANTED_SECRET}": "PLANTED_SECRET",
    "model: {revision: " + TOKEN + "}": "a token of Hugging Face",
    "hydra: {job: {env_copy: [PLANTED_SECRET]}}": "PLANTED_SECRET",
    "3": "Invalid loaded object type: int",
    "model: [": "broken.yaml",
    "- a\n- b": "broken",
    "\tmodel: x": "broken.yaml",
    "model: {name: a}\nmodel: {name: b}": "duplicate key model",
    "model: !!python/object/apply:os.system [ls]": "broken.yaml",
    "model:\n  name: ${nonsense:1}": "nonsense",
    "model:\n  name: ${a.b.c}": "a.b.c",
    "model: {name: '${'}": "no viable alternative at input '${'",
    "defaults: 3": "Invalid defaults list in 'extra/broken'",
    "defaults: [nonsense]": "nonsense",
    "model: 3": "int is not a subclass of ModelConfig",
    "pruning: {raito: 0.5}": "raito",
    "\xff\xfe": "can't decode byte 0xff",
    "a: &a [*a]": "it refers to itself",
    "": None,
}


@pytest.mark.parametrize(("content", "part"), FILES.items())
def test_a_configuration_file_from_elsewhere(
    content: str, part: str | None, tmp_path: Path, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLANTED_SECRET", SECRET)
    (tmp_path / "conf" / "extra").mkdir(parents=True)
    text = f"# @package _global_\n{content}\n"
    (tmp_path / "conf" / "extra" / "broken.yaml").write_bytes(text.encode("latin-1"))
    arguments = ["--config-dir", str(tmp_path / "conf"), "+extra=broken"]
    if part is None:
        assert run_py_here(*arguments, "--cfg", "job", folder=tmp_path).returncode == 0
        return
    line = refused(tmp_path, *arguments, "tracking=none")
    assert part in line and SECRET not in line and TOKEN not in line
    assert not (tmp_path / MARK).exists() and not (tmp_path / "outputs" / "artifacts").exists()


@pytest.mark.parametrize("option", ["setup", "python", "srun_args", "additional_parameters"])
def test_what_a_launcher_runs_comes_from_the_command_line(option: str) -> None:
    """Those of the SLURM launcher, which need not be installed."""
    hydra = {"launcher": {option: ["ls"]}}
    with pytest.raises(ConfigError, match=f"hydra.launcher.{option} runs commands"):
        composition._check_commands(hydra, {})
    composition._check_commands(hydra, {f"hydra.launcher.{option}": ["ls"]})


def test_targets_that_conf_names_are_known_and_others_are_allowed_by_package(package: Path) -> None:
    for file in CONF.rglob("*.yaml"):
        for target in re.findall(r"_target_: (heapr\S+)", file.read_text()):
            check_targets({"x": {"_target_": target}})
    entry = {"_target_": "foreign_package.Mine"}
    with pytest.raises(ConfigError, match="is not a criterion"):
        check_targets({"score": entry}, ["foreign"])
    check_targets({"score": entry}, ["foreign_package"])
    assert plug_in(entry, "score").__name__ == "Mine"


def test_what_the_user_allows_is_built_recorded_and_told_and_no_secret_is_written(
    tmp_path: Path, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole run, with wandb offline and a checkpoint, and secrets in the environment."""
    for name in ("HF_TOKEN", "PLANTED_SECRET", "AWS_SECRET_ACCESS_KEY", "DATABASE_PASSWORD"):
        monkeypatch.setenv(name, f"{SECRET}-{name}")
    write_model(tmp_path / "model")
    texts = [setting for setting in write_texts(tmp_path) if not setting.startswith("evaluation")]
    model = ["model=hf", f"model.path={tmp_path / 'model'}", "model.dtype=float32"]
    allowed = ["plugins.allow=[foreign_package]", "score=magnitude", "score._target_=foreign_package.Mine"]
    arguments = [*model, *texts, *allowed, "evaluation=none", "tracking=wandb_offline"]
    result = run_py_here(*arguments, folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "code of package foreign_package is allowed" in result.stderr
    outputs = tmp_path / "outputs"
    (manifest,) = (outputs / "artifacts" / "score").glob(f"*/{MANIFEST}")
    content = json.loads(manifest.read_text())
    assert content["config"]["criterion"]["_target_"] == "foreign_package.Mine"
    assert content["allowed_code"] == {"packages": ["foreign_package"], "trust_remote_code": False}
    written = [file for file in outputs.rglob("*") if file.is_file()]
    assert any(file.suffix == ".wandb" for file in written) and any(
        file.name == "README.md" for file in written
    )
    assert [file for file in written if SECRET.encode() in file.read_bytes()] == []
    assert SECRET not in result.stdout + result.stderr


def test_secrets_are_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLANTED_API_KEY", SECRET)
    for argument in (
        f"model.name={SECRET}", "model.name=${oc.env:PLANTED_API_KEY}", f"model.revision={TOKEN}", f"tracking.project={TOKEN}",
        "'model.path=\"https://me:swordfish@example.org/model\"'".strip("'"), f"hydra.job.name={SECRET}",
        'model.path="https://example.org/model?token=abcdefgh"', "hydra.run.dir=${oc.env:PLANTED_API_KEY}",
    ):  # fmt: skip
        line = refused(tmp_path, argument, "tracking=none")
        assert "holds" in line
        for secret in (SECRET, TOKEN, "swordfish", "abcdefgh"):
            assert secret not in line
    assert list(tmp_path.iterdir()) == []


def test_an_overrides_file_does_not_put_the_environment_into_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLANTED_SECRET", SECRET)
    for number in range(2):
        (tmp_path / str(number) / ".hydra").mkdir(parents=True)
        (tmp_path / str(number) / ".hydra" / "overrides.yaml").write_text(
            "- model.name=${oc.env:PLANTED_SECRET}\n"
        )
    hydra = "{sweeper: {_target_: '${oc.env:PLANTED_SECRET}BasicSweeper'}, overrides: {task: ['a=${oc.env:PLANTED_SECRET}']}}"
    (tmp_path / "multirun.yaml").write_text(f"hydra: {hydra}\n")
    jobs = collect_jobs(tmp_path)
    assert [job.overrides for job in jobs] == [("model.name=${oc.env:PLANTED_SECRET}",)] * 2
    result = run_here([sys.executable, str(ROOT / "sweep.py"), f"report_dir={tmp_path}"], tmp_path)
    assert SECRET not in result.stdout + result.stderr
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or SECRET.encode() not in file.read_bytes(), file


def test_log_lines_hide_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANTED_PASSWORD", SECRET)
    text = f"a {SECRET} b {TOKEN} c https://u:swordfish@h/x?token=zyxwvu d"
    record = logging.LogRecord("heapr", logging.ERROR, "file", 1, "%s", (text,), None)
    shown = secrets.Formatter("%(message)s").format(record)
    assert shown == "a *** b *** c https://***@h/x?*** d"
    assert secrets.find_secret("/home/me/tokens/hf_model https://example.org/a?b=c me@example.org") is None


KNOWN_FORMS = {  # texts with a secret, and the kind that a refusal names
    f"ghp_{'aB3' * 8}": "a token of GitHub",
    f"github_pat_{'a_3' * 8}": "a token of GitHub",
    f"wandb_v1_{'aB3' * 8}": "a token of wandb",
    f"local-{'0f' * 20}": "a token of wandb",
    f"api_org_{'aB3' * 8}": "a token of Hugging Face",
    f"sk-proj-{'aB3' * 8}": "a key",
    f"AKIA{'AB3D' * 4}": "a key",
    f"AIza{'aB3' * 11}": "a key",
    f"https://{'aB3' * 8}@example.org/x": "a URL with a password",
    "https://example.org/x?a=b&access_token=abc": "a URL with a token",
}


@pytest.mark.parametrize(("text", "kind"), KNOWN_FORMS.items())
def test_a_token_of_a_known_form_is_found_and_hidden(text: str, kind: str) -> None:
    assert secrets.find_secret(f"x={text}") == kind
    hidden = secrets.without_secrets(f"x={text} y")
    assert "***" in hidden and hidden.endswith(" y")
    assert not re.search(r"(aB3|a_3|0f|AB3D)|=abc", hidden)


def test_no_pickle_no_eval_no_shell_in_the_product() -> None:
    """Calls that run code from data: none of them is anywhere in heapr, hydra_plugins or the commands."""
    forbidden = re.compile(
        r"\b(pickle|cloudpickle|dill|joblib|marshal|shelve)\b(?!['\"\w.]*launcher)|torch\.(load|save)\(|\beval\(|\bexec\(|os\.system"
        r"|os\.popen|shell=True|yaml\.(load|full_load|unsafe_load)\(|allow_pickle=True|weights_only=False|\b__import__\("
    )
    found = []
    for file in [*(ROOT / "heapr").rglob("*.py"), *(ROOT / "hydra_plugins").rglob("*.py")]:
        for number, line in enumerate(file.read_text().splitlines(), start=1):
            if forbidden.search(line.split("#")[0]):
                found.append(f"{file.relative_to(ROOT)}:{number}: {line.strip()}")
    assert [line for line in found if not ALLOWED.search(line)] == []


# Words of messages and names of options, and `.eval()`, which puts a model into its mode for evaluation.
ALLOWED = re.compile(
    r"joblib|needs a pickle, which no run writes|\.eval\(\)|are pickled|pickle finds by|where pickle looks|that was pickled|because pickle takes|heapr/secrets.py|heapr/targets.py"
)


def test_debug_shows_the_stack_trace_too(tmp_path: Path) -> None:
    result = run_py_here("pruning.ratio=3", "debug=true", "tracking=none", folder=tmp_path)
    assert result.returncode == 2 and "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: pruning.ratio=3")
    assert "Traceback" not in line_of(run_py_here("pruning.ratio=3", "tracking=none", folder=tmp_path))


def test_a_typed_configuration_is_checked_too(package: Path) -> None:
    with pytest.raises(ConfigError, match=r"score._target_='foreign_package.Mine' is not a criterion"):
        compose_experiment("score._target_=foreign_package.Mine")
