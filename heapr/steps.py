"""What an experiment does, as data: its steps in order, and what determines the result of each.

In: an experiment's configuration, and the identities of its model, text and measurements. Out: `Steps`,
before anything is computed. A run executes them; a dry run and a sweep print them. Settings that change no
result (batch sizes, device, paths, tracking) enter no `Origin`.
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

# Raise a number when a change of the stage's code changes results: older artifacts are then made again.
STAGE_VERSIONS = {"calibrate": 2, "score": 1, "prune": 3, "evaluate": 3}

# Fields of `PruningConfig` that enter every key, and those that change no plan.
ALWAYS_IN_KEY = ("ratio", "scope", "width_multiple", "form")
WITHOUT_INFLUENCE = ("save_checkpoint", "push_to", "push_public", "rounds")


@dataclass(frozen=True)
class Step:
    """One thing that an experiment makes: an artifact, or a part of one.

    Attributes:
        origin: what determines it; a part has the origin of its artifact.
        part: its name in the artifact; WHOLE is the artifact itself.
        what: its name beside the stage in logs, tables and summary.json: the round, the part, or the
            measurement and the model.
        needs: the steps whose files it reads, by what it takes from them: "statistics", "tokens", "scores",
            "plan", or "pruning", the step that last changed the model (a plan, or the repair of what it
            kept). A step without "pruning" works on the dense model. For an evaluation they follow from the
            needs of its measurement.
        measurement: what an evaluation measures; None for all other steps.
    """

    origin: Origin
    part: str = WHOLE
    what: str = ""
    needs: Mapping[str, Step] = field(default_factory=dict)
    measurement: Measurement | None = None

    @property
    def kind(self) -> str:
        """One of calibrate, score, prune, repair, checkpoint and evaluate."""
        return self.part or self.origin.stage

    @property
    def id(self) -> str:
        """A name that no other artifact or part has."""
        return f"{self.origin.key}/{self.part}"

    @property
    def variant(self) -> str:
        """What an evaluation measures: the "dense" model, the "pruned" model, or the "comparison" of both."""
        assert self.measurement is not None
        if Need.MODEL not in self.measurement.needs:
            return "comparison"
        return "pruned" if "pruning" in self.needs else "dense"


@dataclass(frozen=True)
class Steps:
    """All steps of one experiment; iteration gives them in order.

    Attributes:
        dense: calibration, scores and measurements of the dense model, which pruning then changes in place.
        pruning: plan, repair and checkpoint; from the second round on, also calibration and scores of the
            model that the round before left.
        pruned: measurements of the pruned model, and comparisons.
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
        """The steps that follow one."""
        steps = list(self)
        number = next(number for number, other in enumerate(steps) if other is step)
        return steps[number + 1 :]

    @property
    def key(self) -> str:
        """Key of the whole experiment; it depends on results only, not on paths, device or tracking."""
        evaluations = [step for step in self if step.kind == "evaluate"]
        keys = [step.origin.key for step in (self.last("prune"), *evaluations)]
        return hashlib.sha256(" ".join(keys).encode()).hexdigest()[:KEY_LENGTH]


def experiment_steps(
    config: ExperimentConfig,
    text: Corpus | Mixture,
    measurements: Sequence[Measurement],
    *,
    model: Mapping[str, str],
    machine: Mapping[str, Any],
) -> Steps:
    """List the steps of an experiment.

    Args:
        config: the experiment's configuration.
        text: the calibration text.
        measurements: in the order of the configuration; those of one model come before comparisons.
        model: identity of the dense model.
        machine: description of the machine, which enters the origin of timings.
    """
    calibrate, score, *pruning = _rounds(config, _settings_of_tokens(config.calibration, model, text))
    plan = next(step for step in reversed(pruning) if step.kind == "prune")
    finished = next(step for step in reversed(pruning) if step.kind in {"prune", REPAIR_PART})
    made = {"statistics": calibrate, "tokens": calibrate, "scores": score, "plan": plan, "pruning": finished}
    dense: list[Step] = [calibrate, score]
    pruned: list[Step] = []
    of_one_model = [measurement for measurement in measurements if Need.MODEL in measurement.needs]
    others = [measurement for measurement in measurements if Need.MODEL not in measurement.needs]
    for measurement in [*of_one_model, *others]:
        variants = ("dense", "pruned") if Need.MODEL in measurement.needs else ("",)
        for variant in variants:
            step = _evaluate(measurement, variant, made, model=model, machine=machine)
            is_before_pruning = step.needs.keys().isdisjoint({"plan", "pruning"})
            place = dense if is_before_pruning else pruned
            place.append(step)
    return Steps(dense, pruning, pruned)


def _rounds(config: ExperimentConfig, tokens: Mapping[str, Any]) -> list[Step]:
    """Calibration, scores, plan and repair of each round, then the checkpoint.

    Every round removes the same number of atomic experts. A round's key does not depend on how many rounds
    follow, so that experiments which begin alike share their beginning.
    """
    pruning = config.pruning
    steps: list[Step] = []
    earlier: dict[str, Step] = {}  # from the second round on: "pruning" of the round before
    for number in range(1, pruning.rounds + 1):
        what = f"round {number}" if number > 1 else ""
        upstream = [step.origin for step in earlier.values()]
        reused = {"tokens": steps[0]} if steps else {}
        calibrated = _origin("calibrate", tokens, *upstream)
        calibrate = Step(calibrated, what=what, needs={**reused, **earlier})
        scored = _origin("score", {"criterion": dict(config.score)}, calibrated)
        score = Step(scored, what=what, needs={"statistics": calibrate, **earlier})
        first = steps[0] if steps else calibrate
        settings = settings_of_plan(pruning) | {"ratio": ratio_of_round(pruning, number)}
        planned = _origin("prune", settings, scored)
        plan = Step(planned, what=what, needs={"scores": score, "statistics": first, **earlier})
        steps += [calibrate, score, plan]
        if pruning.repair:
            what_repair = f"{what} {REPAIR_PART}".strip()
            needs = {"plan": plan, "tokens": first, **earlier}
            steps.append(Step(planned, REPAIR_PART, what_repair, needs))
        earlier = {"pruning": steps[-1]}
    if pruning.save_checkpoint:
        steps.append(Step(planned, CHECKPOINT_PART, CHECKPOINT_PART, {"plan": plan, **earlier}))
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


def ratio_of_round(pruning: PruningConfig, number: int) -> float:
    """The share of the dense model that is gone after a round; the first round has number 1."""
    return pruning.ratio * number / pruning.rounds


def settings_of_plan(pruning: PruningConfig) -> dict[str, Any]:
    """What determines the plan.

    Other options than those of `ALWAYS_IN_KEY` enter only if they differ from their defaults, so that adding
    an option changes no key.
    """
    default = PruningConfig()
    settings = {}
    for name, value in asdict(pruning).items():
        is_changed = name not in WITHOUT_INFLUENCE and value != getattr(default, name)
        if name in ALWAYS_IN_KEY or is_changed:
            settings[name] = value
    return settings


def _evaluate(
    measurement: Measurement,
    variant: str,
    made: Mapping[str, Step],
    *,
    model: Mapping[str, str],
    machine: Mapping[str, Any],
) -> Step:
    """The step of one measurement.

    Its origin contains what the measurement needs and nothing else, so that a measurement of the dense model
    is made once per model, whatever is pruned.

    Args:
        measurement: what is measured.
        variant: "dense" or "pruned" for a measurement of one model; otherwise empty.
        made: the steps so far, by what may be taken from them.
        model, machine: as in `experiment_steps`.
    """
    names = [need.value for need in Need if need in measurement.needs]
    needs = {name: made[name] for name in names if name in made}
    if variant == "pruned" or Need.DENSE_AND_PRUNED in measurement.needs:
        needs["pruning"] = made["pruning"]
    config: dict[str, Any] = {"evaluator": measurement.identity()}
    if variant == "dense" or Need.DENSE in measurement.needs:
        config["model"] = dict(model)
    if Need.MACHINE in measurement.needs:
        config["machine"] = dict(machine)
    upstream = [step.origin for step in needs.values()]
    origin = _origin("evaluate", config, *upstream)
    return Step(origin, what=f"{measurement.name} {variant}".strip(), needs=needs, measurement=measurement)


def _origin(stage: str, config: Mapping[str, Any], *upstream: Origin) -> Origin:
    keys = {origin.stage: origin.key for origin in upstream}
    return Origin(stage=stage, version=STAGE_VERSIONS[stage], config=config, upstream=keys)
