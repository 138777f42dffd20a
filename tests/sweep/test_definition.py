"""Experiments as files, and how overrides of the command line meet what they sweep."""

from __future__ import annotations

from pathlib import Path

import pytest

from heapr.errors import ConfigError
from heapr.sweep.definition import Definition, experiment_names, load_definition, make_jobs
from heapr.sweep.request import read_request

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
OWN_RATIOS = Definition(
    name="own",
    title="t",
    description="d",
    jobs=[["model=a", "pruning.ratio=0.2,0.4"], ["model=b", "pruning.ratio=0.25"]],
    tiny=[["pruning.ratio=0.1,0.2"]],
    baselines=[["model=a", "score=random", "pruning.ratio=0.2"]],
)
NO_CHECKPOINT = "pruning.save_checkpoint=false"


def test_blocks_follow_each_other_and_need_not_be_one_grid() -> None:
    assert make_jobs(OWN_RATIOS, []) == [
        ("model=a", "pruning.ratio=0.2", NO_CHECKPOINT),
        ("model=a", "pruning.ratio=0.4", NO_CHECKPOINT),
        ("model=b", "pruning.ratio=0.25", NO_CHECKPOINT),
    ]


def test_model_tiny_is_another_list_of_jobs() -> None:
    assert make_jobs(OWN_RATIOS, ["model=tiny"]) == [
        ("pruning.ratio=0.1", "model=tiny", NO_CHECKPOINT),
        ("pruning.ratio=0.2", "model=tiny", NO_CHECKPOINT),
    ]


def test_baselines_come_on_request() -> None:
    assert make_jobs(OWN_RATIOS, [], baselines=True)[3:] == [
        ("model=a", "score=random", "pruning.ratio=0.2", NO_CHECKPOINT)
    ]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model=b", [("b", "0.25")]),  # swept: selects
        ("pruning.ratio=0.2,0.25", [("a", "0.2"), ("b", "0.25")]),
        ("pruning.ratio=0.3", [("a", "0.3"), ("b", "0.3")]),  # not swept: replaces, and equal jobs become one
        # In part: all of it is done.
        (
            "pruning.ratio=0.2,0.3",
            [("a", "0.2"), ("a", "0.3"), ("b", "0.2"), ("b", "0.3")],
        ),
    ],
)
def test_an_override_selects_or_replaces(override: str, expected: list[tuple[str, str]]) -> None:
    assert make_jobs(OWN_RATIOS, [override]) == [
        (f"model={model}", f"pruning.ratio={ratio}", NO_CHECKPOINT) for model, ratio in expected
    ]


def test_lists_are_values_and_checkpoints_can_be_asked_for() -> None:
    jobs = make_jobs(OWN_RATIOS, ["model=b", "evaluation/corpora=[ptb,c4]", "pruning.save_checkpoint=true"])
    assert jobs == [
        ("model=b", "pruning.ratio=0.25", "evaluation/corpora=[ptb,c4]", "pruning.save_checkpoint=True")
    ]


def test_an_unknown_experiment_is_answered_with_the_known_ones() -> None:
    with pytest.raises(
        ConfigError,
        match="unknown experiment .main_tabel.; did you mean main_table\\? known experiments: beyond, ",
    ):
        load_definition(EXPERIMENTS, "main_tabel")


def test_a_misspelt_field_of_an_experiment_is_named(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "experiment.yaml").write_text("name: own\nreports: {}\n")
    with pytest.raises(ConfigError, match="unknown key 'reports'; did you mean report\\?"):
        load_definition(tmp_path, "own")


@pytest.mark.parametrize("name", experiment_names(EXPERIMENTS))
def test_every_experiment_is_complete(name: str) -> None:
    definition = load_definition(EXPERIMENTS, name)
    assert definition.name == name
    readme = (EXPERIMENTS / name / "README.md").read_text()
    assert f"python sweep.py experiment={name}" in readme
    assert f"`{name}`" in (EXPERIMENTS.parent / "docs" / "experiments.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either experiment=<name> or report_dir=<folder>; experiments: one, two"),
        (["experiment=one", "report_dir=x"], "give either"),
        (["report_dir=x", "model=tiny"], "takes no other arguments"),
        (["experiment=one", "--dryrun"], "did you mean --dry-run"),
        (["experiment=one", "tiny"], "'tiny' is neither an override"),
        (["experiment=one", "dry_run=true"], "give --dry-run"),
        (["experiment=one", "results=yes"], "results=yes is neither true nor false"),
    ],
)
def test_a_command_line_that_asks_for_nothing(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_request(arguments, ["one", "two"])


def test_overrides_of_hydra_itself_are_no_overrides_of_jobs() -> None:
    request = read_request(
        ["experiment=one", "model=tiny", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "--dry-run"],
        ["one"],
    )
    assert (request.overrides, request.settings) == (
        ("model=tiny",),
        ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2"),
    )
    assert request.dry_run and not request.results and request.version == "tiny"
