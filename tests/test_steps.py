"""The steps of an experiment as data: their order, their names and what each needs."""

from __future__ import annotations

import pytest

from heapr.prepare import prepare
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
    steps = steps_of(
        *settings,
        "recipe=best",
        "pruning.rounds=2",
        "evaluation.throughput=null",
        "evaluation.efficiency=null",
    )
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
    assert [step.variant for step in steps if step.kind == "evaluate"] == [
        "dense",
        "comparison",
        "pruned",
        "comparison",
        "comparison",
    ]


@pytest.mark.parametrize(
    "overrides",
    [
        ["recipe=best", "pruning.rounds=3"],
        ["recipe=heapr"],
        ["pruning.rounds=2", "evaluation.perplexity=null"],
    ],
)
def test_what_a_step_needs_was_made_before_it(settings: list[str], overrides: list[str]) -> None:
    steps = list(steps_of(*settings, *overrides))
    ids = [step.id for step in steps]
    assert len(set(ids)) == len(ids)
    for number, step in enumerate(steps):
        needed = {name: ids.index(earlier.id) for name, earlier in step.needs.items()}
        assert all(place < number for place in needed.values())
        # The newest that is finished, not an earlier round's.
        if step.kind in {"calibrate", "evaluate"} and "pruning" in needed:
            assert needed["pruning"] == max(
                place for place in range(number) if steps[place].kind in {"prune", "repair"}
            )


def test_a_part_is_determined_as_its_artifact_is(settings: list[str]) -> None:
    steps = steps_of(*settings, "recipe=best")
    prune, repair, checkpoint = steps.last("prune"), steps.last("repair"), steps.last("checkpoint")
    assert prune.origin == repair.origin == checkpoint.origin
    assert repair.needs["plan"] is checkpoint.needs["plan"] is prune and checkpoint.needs["pruning"] is repair
    assert "pruning" not in repair.needs


def test_a_measurement_depends_on_what_it_needs_and_on_nothing_else(settings: list[str]) -> None:
    cost = "+evaluation.calibration_cost={_target_:heapr.evaluation.calibration_cost.CalibrationCost,num_sequences:2,batch_size:1,repeats:1}"
    steps = steps_of(*settings, "recipe=best", cost)
    found = {step.what: step for step in steps if step.kind == "evaluate"}
    assert {what: set(step.needs) for what, step in found.items()} == {
        "perplexity/text_files dense": set(),
        "perplexity/text_files pruned": {"pruning"},
        "efficiency dense": {"statistics"},
        "efficiency pruned": {"statistics", "pruning"},
        "truth": {"statistics", "tokens", "scores"},
        "calibration_cost": {"tokens"},
        "routing": {"statistics", "plan"},
        "fidelity/text_files": {"pruning"},
        "throughput": {"tokens", "pruning"},
    }
    for step in found.values():
        assert step.origin.upstream == {
            earlier.origin.stage: earlier.origin.key for earlier in step.needs.values()
        }
    of_dense = {what for what, step in found.items() if "model" in step.origin.config}
    assert of_dense == {"perplexity/text_files dense", "efficiency dense", "truth", "calibration_cost"}
    timed = {what for what, step in found.items() if "machine" in step.origin.config}
    assert timed == {"calibration_cost", "throughput"}
    assert (
        found["routing"].needs["plan"].kind == "prune"
        and found["throughput"].needs["pruning"].kind == "repair"
    )


def test_timings_are_of_the_threads_that_the_run_will_have(settings: list[str]) -> None:
    keys = set()
    for threads in (1, 2):
        steps = {step.what: step for step in steps_of(*settings, f"runtime.num_threads={threads}")}
        assert steps["throughput"].origin.config["machine"]["threads"] == threads
        keys.add(steps["throughput"].origin.key)
    assert len(keys) == 2
