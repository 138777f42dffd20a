"""The steps of an experiment as data: their order, their names and what each needs."""

from __future__ import annotations

import pytest

from heapr.experiment import prepare
from heapr.steps import Steps
from tests.experiment import compose_experiment, write_model, write_texts


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("steps")
    model = ["model=hf", f"model.path={write_model(folder / 'model')}", "model.dtype=float32"]
    return ["tracking=none", f"paths.outputs={folder / 'outputs'}", *model, *write_texts(folder)]


def steps_of(*overrides: str) -> Steps:
    return prepare(compose_experiment(*overrides)).steps


def test_two_rounds_with_repair_in_their_order(settings: list[str]) -> None:
    steps = steps_of(*settings, "recipe=best", "pruning.rounds=2", "evaluation.throughput=null", "evaluation.efficiency=null")
    assert [(step.kind, step.what) for step in steps] == [
        ("calibrate", ""),
        ("score", ""),
        ("evaluate", "perplexity/text_files dense"),
        ("evaluate", "truth"),
        ("prune", ""),
        ("repair", "repair"),
        ("calibrate", "round 2"),
        ("score", "round 2"),
        ("prune", "round 2"),
        ("repair", "round 2 repair"),
        ("checkpoint", "checkpoint"),
        ("evaluate", "perplexity/text_files pruned"),
        ("evaluate", "routing"),
        ("evaluate", "fidelity/text_files"),
    ]
    assert steps.first("prune").origin.config["ratio"] == steps.last("prune").origin.config["ratio"] / 2
    assert [step.variant for step in steps if step.kind == "evaluate"] == ["dense", "comparison", "pruned", "comparison", "comparison"]


@pytest.mark.parametrize(
    "overrides", [["recipe=best", "pruning.rounds=3"], ["recipe=heapr"], ["pruning.rounds=2", "evaluation.perplexity=null"]]
)
def test_what_a_step_needs_was_made_before_it(settings: list[str], overrides: list[str]) -> None:
    steps = list(steps_of(*settings, *overrides))
    ids = [step.id for step in steps]
    assert len(set(ids)) == len(ids)
    for number, step in enumerate(steps):
        needed = {name: ids.index(earlier.id) for name, earlier in step.needs.items()}
        assert all(place < number for place in needed.values())
        if step.kind in {"calibrate", "evaluate"} and "pruning" in needed:  # the newest that is finished, not an earlier round's
            assert needed["pruning"] == max(place for place in range(number) if steps[place].kind in {"prune", "repair"})


def test_a_part_is_determined_as_its_artifact_is(settings: list[str]) -> None:
    steps = steps_of(*settings, "recipe=best")
    prune, repair, checkpoint = steps.last("prune"), steps.last("repair"), steps.last("checkpoint")
    assert prune.origin == repair.origin == checkpoint.origin
    assert repair.needs["plan"] is checkpoint.needs["plan"] is prune and checkpoint.needs["pruning"] is repair
    assert "pruning" not in repair.needs
