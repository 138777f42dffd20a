"""What an experiment does, as data: its steps in their order, and what determines the result of each.

In: an experiment's configuration, and what its model, text and evaluators are. Out: `Steps`, before anything is computed. A run executes
them, a dry run and a sweep print them. What changes no result (batch sizes, device, paths, tracking) is in no `Origin`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from heapr.artifacts import CHECKPOINT_PART, REPAIR_PART
from heapr.evaluation.evaluator import Comparison, Evaluator
from heapr.schema import CalibrationConfig, ExperimentConfig, PruningConfig
from heapr.store import KEY_LENGTH, WHOLE, Origin
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
        what: its name beside the stage in logs, tables and summary.json: the round, the part, or what is measured on which model.
        needs: the steps whose files it reads, by what it takes from them: "statistics", "tokens", "scores", "plan", or the "pruning" that
            was finished last (a plan, or the repair of what it kept). Without a "pruning", its model is the dense one.
        measurement: of an evaluation.
    """

    origin: Origin
    part: str = WHOLE
    what: str = ""
    needs: Mapping[str, Step] = field(default_factory=dict)
    measurement: Evaluator | Comparison | None = None

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
        """Of an evaluation: whose metrics it gives, those of the "dense" or the "pruned" model, or of the "comparison"."""
        if isinstance(self.measurement, Comparison):
            return "comparison"
        return "pruned" if "pruning" in self.needs else "dense"


@dataclass(frozen=True)
class Steps:
    """All steps of one experiment; iterating gives them in their order.

    Attributes:
        dense: calibration and scores of the dense model, and what is measured on it: before pruning changes it in place.
        pruning: plan, repair and checkpoint; from the second round on, calibration and scores of the model that the round before left.
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
        """Of the whole experiment: the same whenever all results are, whatever the paths, device or tracking."""
        ends = [self.last("prune"), *(step for step in self if step.kind == "evaluate")]
        return hashlib.sha256(" ".join(step.origin.key for step in ends).encode()).hexdigest()[:KEY_LENGTH]


def experiment_steps(
    config: ExperimentConfig,
    model_identity: Mapping[str, str],
    text: Corpus | Mixture,
    measurements: Sequence[Evaluator | Comparison],
) -> Steps:
    """The steps of an experiment.

    Args:
        config: what is asked.
        model_identity: what the model is.
        text: calibrated on.
        measurements: in the order in which they are made on each model.
    """
    tokens = _settings_of_tokens(config.calibration, model_identity, text)
    calibrate, score, *pruning = _rounds(config, tokens)
    finished = next(step for step in reversed(pruning) if step.kind in {"prune", REPAIR_PART})
    evaluators = [entry for entry in measurements if isinstance(entry, Evaluator)]
    comparisons = [entry for entry in measurements if isinstance(entry, Comparison)]
    return Steps(
        dense=[
            calibrate,
            score,
            *(_evaluate_dense(evaluator, model_identity, calibrate) for evaluator in evaluators),
            *(_compare(comparison, score) for comparison in comparisons if comparison.upstream == "score"),
        ],
        pruning=pruning,
        pruned=[
            *(_evaluate_pruned(evaluator, calibrate, finished) for evaluator in evaluators),
            *(_compare(comparison, score, finished) for comparison in comparisons if comparison.upstream == "prune"),
        ],
    )


def _rounds(config: ExperimentConfig, tokens: Mapping[str, Any]) -> list[Step]:
    """Calibration, scores and pruning, once for each round. Every round removes the same number of atomic experts. A round's key does not
    tell how many follow, so that experiments which begin alike share their beginning."""
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
        plan = Step(_origin("prune", settings, score.origin), what=what, needs={"scores": score, "statistics": first, **earlier})
        steps += [calibrate, score, plan]
        if pruning.repair:
            what_repair = f"{what} {REPAIR_PART}".strip()
            steps.append(Step(plan.origin, REPAIR_PART, what_repair, needs={"plan": plan, "tokens": first, **earlier}))
        earlier = {"pruning": steps[-1]}
    if pruning.save_checkpoint:
        steps.append(Step(plan.origin, CHECKPOINT_PART, CHECKPOINT_PART, needs={"plan": plan, **earlier}))
    return steps


def _settings_of_tokens(settings: CalibrationConfig, model_identity: Mapping[str, str], text: Corpus | Mixture) -> dict[str, Any]:
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
    """What determines the plan. Options enter where they are not at their defaults, so that a new one changes no key."""
    default = PruningConfig()
    settings = {name: value for name, value in asdict(pruning).items() if name not in WITHOUT_INFLUENCE}
    return {name: value for name, value in settings.items() if name in ALWAYS_IN_KEY or value != getattr(default, name)}


def _evaluate_dense(evaluator: Evaluator, model_identity: Mapping[str, str], calibrate: Step) -> Step:
    """Determined by the calibration only if the evaluator reads its statistics, so that most are made once per model."""
    config = {"evaluator": evaluator.identity(), "model": dict(model_identity)}
    origin = _origin("evaluate", config, *([calibrate.origin] if evaluator.uses_statistics else []))
    return Step(origin, what=f"{evaluator.name} dense", needs={"statistics": calibrate}, measurement=evaluator)


def _evaluate_pruned(evaluator: Evaluator, calibrate: Step, pruning: Step) -> Step:
    origin = _origin("evaluate", {"evaluator": evaluator.identity()}, pruning.origin)
    needs = {"statistics": calibrate, "pruning": pruning}
    return Step(origin, what=f"{evaluator.name} pruned", needs=needs, measurement=evaluator)


def _compare(comparison: Comparison, score: Step, pruning: Step | None = None) -> Step:
    upstream = score if pruning is None else pruning
    calibrate = score.needs["statistics"]
    needs = {"statistics": calibrate, "tokens": calibrate, "scores": score} | ({"pruning": pruning} if pruning else {})
    origin = _origin("evaluate", {"evaluator": comparison.identity()}, upstream.origin)
    return Step(origin, what=comparison.name, needs=needs, measurement=comparison)


def _origin(stage: str, config: Mapping[str, Any], *upstream: Origin) -> Origin:
    keys = {origin.stage: origin.key for origin in upstream}
    return Origin(stage=stage, version=STAGE_VERSIONS[stage], config=config, upstream=keys)
