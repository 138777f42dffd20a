"""Every option of every group composes, passes the checks, and its plug-ins can be built."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException

from heapr.compose_experiment import compose_experiment as composed_by_hydra
from heapr.evaluation.build import build_measurements
from heapr.explain import explain
from heapr.plugins import build
from heapr.schema import register
from heapr.text.corpora import Corpus
from heapr.text.mixture import Mixture
from heapr.types import Granularity
from tests.experiment import CONF, compose_experiment

CPU = torch.device("cpu")
GROUPS = (
    "model",
    "calibration",
    "score",
    "pruning",
    "pruning/repair",
    "recipe",
    "evaluation",
    "tracking",
    "runtime",
    "paths",
)
OPTIONS = [[f"{group}={path.stem}" for path in sorted((CONF / group).glob("*.yaml"))] for group in GROUPS]
# Composing takes time.
TOGETHER = [[option for option in options if option] for options in itertools.zip_longest(*OPTIONS)]
NEEDED = {
    "model=hf": ["model.path=owner/name"],
    "calibration=text_files": ["calibration.corpus.paths=[{text}]"],
    "recipe=stock": ["pruning.scope=expert"],  # against the option of `pruning` that comes with it here
}


@pytest.mark.parametrize("options", TOGETHER, ids=" ".join)
def test_every_option_composes_and_builds(options: list[str], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some text")
    overrides = [override.format(text=text) for option in options for override in NEEDED.get(option, [])]
    config = compose_experiment(*options, *overrides)
    assert isinstance(build(config.calibration.corpus, "calibration.corpus"), Corpus | Mixture)
    assert config.pruning.repair is None or isinstance(
        build(config.pruning.repair, "pruning.repair").is_sequential, bool
    )
    assert isinstance(build(config.score, "score").granularity, Granularity)
    build_measurements(config.evaluation)


@pytest.mark.parametrize("name", [path.stem for path in sorted((CONF / "corpus").glob("*.yaml"))])
def test_a_corpus_is_written_once_and_used_three_times(name: str, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some text")
    alone = compose_experiment(f"corpus@calibration.corpus={name}").calibration.corpus
    paths = {"paths": [str(text)]} if name == "text_files" else {}
    assert build(alone | paths, "calibration.corpus").name == name
    parts = compose_experiment(
        "calibration=mixture", f"calibration/parts@calibration.corpus.parts=[{name}]"
    ).calibration.corpus["parts"]
    assert parts == {name: {"weight": 1, "corpus": alone}}
    measured = compose_experiment(f"evaluation/corpora=[{name}]").evaluation["corpora"]
    assert {key for key in alone if measured[name][key] != alone[key]} <= {"split", "num_documents"}
    if (CONF / "calibration" / f"{name}.yaml").is_file():
        assert compose_experiment(f"calibration={name}").calibration.corpus == alone


@pytest.mark.parametrize(
    "corpus", [path.stem for path in sorted((CONF / "evaluation" / "corpora").glob("*.yaml"))]
)
def test_every_evaluation_corpus_builds(corpus: str, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some text")
    overrides = [f"evaluation.corpora.text_files.paths=[{text}]"] if corpus == "text_files" else []
    measurements = build_measurements(
        compose_experiment(f"evaluation/corpora=[{corpus}]", *overrides).evaluation
    )
    assert [one.name for one in measurements] == [
        f"perplexity/{corpus}",
        "accuracy/pydocs_continuation",
        "efficiency",
        "routing",
        f"fidelity/{corpus}",
        "throughput",
        "truth",
    ]


def test_the_papers_evaluation_is_its_corpora_its_tasks_and_its_window() -> None:
    config = compose_experiment("evaluation=paper")
    tasks = ["openbookqa", "arc_easy", "winogrande", "hellaswag", "arc_challenge", "piqa", "mathqa"]
    names = [one.name for one in build_measurements(config.evaluation)]
    assert names == [
        "perplexity/wikitext2",
        "perplexity/ptb",
        *(f"accuracy/{task}" for task in tasks),
        "efficiency",
    ]
    assert config.evaluation["perplexity"]["window"] == 2048


@pytest.mark.parametrize("corpus", ["wikitext2", "c4"])
def test_the_papers_calibration_protocol(corpus: str) -> None:
    calibration = compose_experiment(f"calibration={corpus}").calibration
    assert (calibration.num_samples, calibration.sequence_length, calibration.seed) == (128, 2048, 0)
    assert calibration.corpus["split"] == "train"


def test_no_corpus_is_calibrated_and_measured_on_the_same_split() -> None:
    splits = {
        "pydocs": "heldout",
        "numpydocs": "heldout",
        "wikitext2": "test",
        "ptb": "test",
        "c4": "validation",
    }
    measured = compose_experiment(f"evaluation/corpora=[{','.join(splits)}]").evaluation["corpora"]
    assert {name: corpus["split"] for name, corpus in measured.items()} == splits
    for name in splits:
        assert compose_experiment(f"corpus@calibration.corpus={name}").calibration.corpus["split"] == "train"


def test_every_group_has_a_package_folder_and_a_test_folder_of_its_name() -> None:
    root = CONF.parent
    for group in ("model", "calibration", "score", "pruning", "evaluation", "tracking"):
        assert (root / "heapr" / group).is_dir() and (root / "tests" / group).is_dir()


def test_options_are_documented_in_their_first_line() -> None:
    for path in CONF.rglob("*.yaml"):
        if "hydra" not in path.parts and path.parent.name not in {"paths"}:
            assert path.read_text().startswith("# "), path


def test_a_launcher_of_your_own_is_a_file_beside_ours(tmp_path: Path) -> None:
    """As docs/cluster.md writes it; options of a launcher that is not chosen are refused in one line."""
    conf = tmp_path / "conf"
    shutil.copytree(CONF, conf, ignore=shutil.ignore_patterns("local"))
    mine = "defaults: [submitit_slurm]\npartition: gpu\naccount: myaccount\n"
    (conf / "hydra" / "launcher" / "mycluster.yaml").write_text(mine)
    register()
    with initialize_config_dir(str(conf), version_base="1.3"):
        config = compose("config", overrides=["hydra/launcher=mycluster"], return_hydra_config=True)
        assert (config.hydra.launcher.partition, config.hydra.launcher.timeout_min) == ("gpu", 240)
        (conf / "local").mkdir()
        misplaced = "# @package _global_\nhydra: {launcher: {partition: gpu}}\n"
        (conf / "local" / "default.yaml").write_text(misplaced)
        with pytest.raises(ConfigCompositionException) as refusal:
            compose("config")
    message = explain(refusal.value, conf, [])
    assert message.startswith("conf/local/default.yaml sets 'hydra.launcher.partition': the launcher that is")
    assert "conf/hydra/launcher/<name>.yaml (docs/cluster.md)" in message
    assert "\n" not in message


def test_your_own_machines_settings_are_taken_from_conf_local(tmp_path: Path) -> None:
    shutil.copytree(CONF, tmp_path / "conf", ignore=shutil.ignore_patterns("local"))
    (tmp_path / "conf" / "local").mkdir()
    (tmp_path / "conf" / "local" / "default.yaml").write_text(
        "runtime:\n  num_threads: 3\npaths:\n  outputs: /scratch/heapr\n"
    )
    config = compose_experiment(conf=tmp_path / "conf")
    assert config.runtime.num_threads == 3 and config.paths.outputs == "/scratch/heapr"


@pytest.mark.parametrize(
    "overrides",
    [
        ["evaluation/corpora=[pydocs,ptb]", "evaluation/evaluators@evaluation=[perplexity]", "score={_target_:heapr.score.gradient.Fisher}", "dry_run=true"],
        [
            "pruning.ratio=0.4", "score=random", "score.seed=3", "pruning=layer", "score.seed=4", "model=hf", "model.path=a/b",
            "~evaluation.zero_shot", "+evaluation.more={_target_:heapr.evaluation.zero_shot.ZeroShot,tasks:[a,b]}", "++runtime.num_threads=2",
        ],
    ],
)  # fmt: skip
def test_tests_compose_what_hydra_composes(overrides: list[str]) -> None:
    assert compose_experiment(*overrides) == composed_by_hydra(overrides, CONF)


@pytest.mark.parametrize("override", ["pruning.ratoi=0.3", "score=haepr", "pruning.ratio=lots"])
def test_tests_refuse_what_hydra_refuses(override: str) -> None:
    with pytest.raises(ConfigCompositionException) as ours:
        compose_experiment(override)
    with pytest.raises(ConfigCompositionException) as hydras:
        composed_by_hydra([override], CONF)
    assert str(ours.value) == str(hydras.value)


def test_random_scores_follow_the_seed_of_the_calibration() -> None:
    assert compose_experiment("score=random", "calibration.seed=3").score["seed"] == 3
    assert compose_experiment("score=random", "calibration.seed=3", "score.seed=5").score["seed"] == 5
