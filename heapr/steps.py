"""What an experiment does, as data: its steps in their order, and what determines the result of each.

In: an experiment's configuration, and what its model, text and measurements are. Out: `Steps`, before
anything is computed. A run executes them, a dry run and a sweep print them. What changes no result (batch
sizes, device, paths, tracking) is in no `Origin`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from heapr.artifacts import CHECKPOINT_PART, REPAIR_PART
from heapr.evaluation.measurement import Measurement, Need
from heapr.origin import KEY_LENGTH, Origin
from heapr.schema import CalibrationConfig, ExperimentConfig, PruningConfig
from heapr.store import WHOLE
from heapr.text.corpora import Corpus
from heapr.text.mixture import Mixture

# Raised when the code of a stage gives other results than before: older artifacts are then made again.
STAGE_VERSIONS = {"calibrate": 2, "score": 1, "prune": 3, "evaluate": 3}

# Fields of `PruningConfig`: those that were in the first keys, and those that change no plan.
ALWAYS_IN_KEY, WITHOUT_INFLUENCE = ("ratio", "scope", "width_multiple", "form"), ("save_checkpoint", "rounds")


@dataclass(frozen=True)
class Step:
    """One thing that an experiment makes: an artifact, or a part of one.

    Attributes:
        origin: what determines it; a part has that of its artifact.
        part: its name in the artifact; WHOLE is the artifact itself.
        what: its name beside the stage in logs, tables and summary.json: the round, the part, or what is
            measured on which model.
        needs: the steps whose files it reads, by what it takes from them: "statistics", "tokens", "scores",
            "plan", or the "pruning" that was finished last (a plan, or the repair of what it kept). Without a
            "pruning", its model is the dense one. Those of an evaluation follow from what its measurement
            needs.
        measurement: of an evaluation.
    """

    origin: Origin
    part: str = WHOLE
    what: str = ""
    needs: Mapping[str, Step] = field(default_factory=dict)
    measurement: Measurement | None = None

    @property
    def kind(self) -> str:
        """calibrate, score, prune, repair, checkpoint or evaluate."""
        return self.part or self.origin.stage

    @property
    def id(self) -> str:
        """Different from that of all other artifacts and parts."""
        return f"{self.origin.key}/{self.part}"

    @property
    def variant(self) -> str:
        """Of an evaluation: whose metrics it gives, those of the "dense" or the "pruned" model, or of the
        "comparison"."""
        assert self.measurement is not None
        if Need.MODEL not in self.measurement.needs:
            return "comparison"
        return "pruned" if "pruning" in self.needs else "dense"


@dataclass(frozen=True)
class Steps:
    """All steps of one experiment; iterating gives them in their order.

    Attributes:
        dense: calibration and scores of the dense model, and what is measured on it: before pruning changes
            it in place.
        pruning: plan, repair and checkpoint; from the second round on, calibration and scores of the model
            that the round before left.
        pruned: what is measured on the pruned model.
    """

    dense: Sequence[Step] = ()
    pruning: Sequence[Step] = ()
    pruned: Sequence[Step] = ()

    def __iter__(self) -> Iterator[Step]:
        yield from (*self.dense, *self.pruning, *self.pruned)

    def first(self, kind: str) -> Step:
        return next(step for step in self if step.kind == kind)

    def last(self, kind: str) -> Step:
        return next(step for step in reversed(list(self)) if step.kind == kind)

    def after(self, step: Step) -> list[Step]:
        """The steps behind one."""
        steps = list(self)
        number = next(number for number, other in enumerate(steps) if other is step)
        return steps[number + 1 :]

    @property
    def key(self) -> str:
        """Of the whole experiment: the same whenever all results are, whatever the paths, device or
        tracking."""
        ends = [self.last("prune"), *(step for step in self if step.kind == "evaluate")]
        return hashlib.sha256(" ".join(step.origin.key for step in ends).encode()).hexdigest()[:KEY_LENGTH]


def experiment_steps(
    config: ExperimentConfig,
    text: Corpus | Mixture,
    measurements: Sequence[Measurement],
    *,
    model: Mapping[str, str],
    machine: Mapping[str, Any],
) -> Steps:
    """The steps of an experiment.

    Args:
        config: what is asked.
        text: calibrated on.
        measurements: in the order of the configuration; those of one model are made before those that
            compare.
        model: what it is.
        machine: what timings are made on.
    """
    calibrate, score, *pruning = _rounds(config, _settings_of_tokens(config.calibration, model, text))
    plan = next(step for step in reversed(pruning) if step.kind == "prune")
    finished = next(step for step in reversed(pruning) if step.kind in {"prune", REPAIR_PART})
    made = {"statistics": calibrate, "tokens": calibrate, "scores": score, "plan": plan, "pruning": finished}
    dense: list[Step] = [calibrate, score]
    pruned: list[Step] = []
    for measurement in sorted(measurements, key=lambda measurement: Need.MODEL not in measurement.needs):
        variants = ("dense", "pruned") if Need.MODEL in measurement.needs else ("",)
        for variant in variants:
            step = _evaluate(measurement, variant, made, model=model, machine=machine)
            is_before_pruning = step.needs.keys().isdisjoint({"plan", "pruning"})
            (dense if is_before_pruning else pruned).append(step)
    return Steps(dense, pruning, pruned)


def _rounds(config: ExperimentConfig, tokens: Mapping[str, Any]) -> list[Step]:
    """Calibration, scores and pruning, once for each round. Every round removes the same number of atomic
    experts. A round's key does not tell how many follow, so that experiments which begin alike share their
    beginning."""
    pruning = config.pruning
    steps: list[Step] = []
    earlier: dict[str, Step] = {}  # from the second round on: what was finished in the one before
    for number in range(1, pruning.rounds + 1):
        what = f"round {number}" if number > 1 else ""
        upstream = [step.origin for step in earlier.values()]
        reused = {"tokens": steps[0]} if steps else {}
        calibrate = Step(_origin("calibrate", tokens, *upstream), what=what, needs={**reused, **earlier})
        scored = _origin("score", {"criterion": dict(config.score)}, calibrate.origin)
        score = Step(scored, what=what, needs={"statistics": calibrate, **earlier})
        settings = _settings_of_plan(pruning) | {"ratio": pruning.ratio * number / pruning.rounds}
        first = steps[0] if steps else calibrate
        plan = Step(
            _origin("prune", settings, score.origin),
            what=what,
            needs={"scores": score, "statistics": first, **earlier},
        )
        steps += [calibrate, score, plan]
        if pruning.repair:
            what_repair = f"{what} {REPAIR_PART}".strip()
            steps.append(
                Step(plan.origin, REPAIR_PART, what_repair, needs={"plan": plan, "tokens": first, **earlier})
            )
        earlier = {"pruning": steps[-1]}
    if pruning.save_checkpoint:
        steps.append(Step(plan.origin, CHECKPOINT_PART, CHECKPOINT_PART, needs={"plan": plan, **earlier}))
    return steps


def _settings_of_tokens(
    settings: CalibrationConfig, model_identity: Mapping[str, str], text: Corpus | Mixture
) -> dict[str, Any]:
    """What determines the calibration."""
    return {
        "model": dict(model_identity),
        "corpus": text.identity(),
        "num_samples": settings.num_samples,
        "sequence_length": settings.sequence_length,
        "seed": settings.seed,
        "max_characters": settings.max_characters,
    }


def _settings_of_plan(pruning: PruningConfig) -> dict[str, Any]:
    """What determines the plan. Options enter where they are not at their defaults, so that a new one changes
    no key."""
    default = PruningConfig()
    settings = {name: value for name, value in asdict(pruning).items() if name not in WITHOUT_INFLUENCE}
    return {
        name: value
        for name, value in settings.items()
        if name in ALWAYS_IN_KEY or value != getattr(default, name)
    }


def _evaluate(
    measurement: Measurement,
    variant: str,
    made: Mapping[str, Step],
    *,
    model: Mapping[str, str],
    machine: Mapping[str, Any],
) -> Step:
    """One measurement on the "dense" or the "pruned" model; of one that compares, the variant is empty.

    It depends on what it needs and nothing else, so that what the dense model alone decides is made once per
    model, whatever is pruned.

    Args:
        measurement, variant: see above.
        made: the steps that there are, by what may be taken from them.
        model, machine: as in `experiment_steps`.
    """
    needs = {
        need.value: made[need.value] for need in Need if need in measurement.needs and need.value in made
    }
    if variant == "pruned" or Need.DENSE_AND_PRUNED in measurement.needs:
        needs["pruning"] = made["pruning"]
    config: dict[str, Any] = {"evaluator": measurement.identity()}
    if variant == "dense" or Need.DENSE in measurement.needs:
        config["model"] = dict(model)
    if Need.MACHINE in measurement.needs:
        config["machine"] = dict(machine)
    origin = _origin("evaluate", config, *(step.origin for step in needs.values()))
    return Step(origin, what=f"{measurement.name} {variant}".strip(), needs=needs, measurement=measurement)


def _origin(stage: str, config: Mapping[str, Any], *upstream: Origin) -> Origin:
    keys = {origin.stage: origin.key for origin in upstream}
    return Origin(stage=stage, version=STAGE_VERSIONS[stage], config=config, upstream=keys)
