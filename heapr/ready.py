"""The last checks before a run: whatever can still fail through a user's mistake, and takes text, tokenizer
or the disk to find.

In: a prepared experiment. Out: its calibration tokens, if they are still to be calibrated on.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from heapr.artifacts import CHECKPOINT_PART, REPAIR_PART
from heapr.experiment import Experiment
from heapr.steps import Step, Steps
from heapr.text.mixture import identities_of_parts
from heapr.text.splits import share_text
from heapr.text.windows import draw
from heapr.types import TokenWindows

logger = logging.getLogger(__name__)


def make_ready(experiment: Experiment) -> TokenWindows | None:
    """Set the number of threads, and check weights, disk, text and tasks of the steps that are still to be
    made.

    Returns:
        the calibration tokens; None if the calibration is in the store.

    Raises:
        ConfigError: the user's mistake.
    """
    if experiment.config.runtime.num_threads is not None:
        torch.set_num_threads(experiment.config.runtime.num_threads)
    if experiment.source.has_weights:  # else they are fetched when the model is loaded, and looked at then
        _ = experiment.source.left_out
    for note in experiment.notes_on_budget:
        logger.info("%-9s %s", "prune", note)
    missing = [step for step in experiment.steps if not experiment.store.has(step.origin, step.part)]
    _check_space(missing, experiment)
    _warn_of_overlap(experiment.steps)
    prepared = {id(step.measurement): step.measurement for step in missing if step.measurement is not None}
    for measurement in prepared.values():
        measurement.prepare(experiment.source)
    is_calibrated = experiment.store.has(experiment.steps.first("calibrate").origin)
    return None if is_calibrated else _calibration_tokens(experiment)


def _check_space(missing: Sequence[Step], experiment: Experiment) -> None:
    """The disk has room for what is still to be made of repaired weights (at least the columns of W_down) and
    of the checkpoint.

    Raises:
        ConfigError: it has not.
    """
    source = experiment.source
    routed = sum(
        sum(width_E) * source.atomic_expert_parameters[index] for index, width_E in source.widths.items()
    )
    num_parameters = 0
    for step in missing:
        if step.kind == REPAIR_PART:
            num_parameters += _num_kept(step, routed) // 3
        if step.kind == CHECKPOINT_PART:
            total = sum(parameter.numel() for parameter in source.on_meta().model.parameters())
            is_masked = experiment.config.pruning.form == "masked"
            num_parameters += total if is_masked else total - routed + _num_kept(step, routed)
    instead = "leave the checkpoint out with pruning.save_checkpoint=false"
    experiment.store.check_space(num_parameters * source.dtype.itemsize, "the pruned weights", instead)


def _num_kept(step: Step, num_parameters: int) -> int:
    """What a plan leaves of so many parameters."""
    ratio: float = step.origin.config["ratio"]
    return round((1 - ratio) * num_parameters)


def _warn_of_overlap(steps: Steps) -> None:
    """Calibration and evaluation text are apart if they are other texts, or parts of one that have no
    document in common."""
    calibrated = [
        corpus for corpus, _ in identities_of_parts(steps.first("calibrate").origin.config["corpus"])
    ]
    evaluations = [step.origin.config["evaluator"] for step in steps if step.kind == "evaluate"]
    measured = [evaluation["corpus"] for evaluation in evaluations if evaluation.get("corpus")]
    shared = [corpus["corpus"] for corpus in measured if any(share_text(part, corpus) for part in calibrated)]
    for name in dict.fromkeys(shared):
        logger.warning(
            "%s is measured on text that is calibrated on; choose another split for one of them, such as"
            " train and heldout",
            name,
        )


def _calibration_tokens(experiment: Experiment) -> TokenWindows:
    settings, text = experiment.config.calibration, experiment.plugins.text
    assert text is not None, "only a dry run goes on without the text"
    return draw(
        text,
        experiment.source.tokenizer,
        length=settings.sequence_length,
        num_samples=settings.num_samples,
        seed=settings.seed,
        max_characters=settings.max_characters,
    )
