"""The last checks before a run, for mistakes that only the text, the tokenizer or the disk can reveal.

In: a prepared experiment. Out: its calibration tokens, unless the calibration is in the store.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from heapr.artifacts import CHECKPOINT_PART, REPAIR_PART
from heapr.evaluation.generation import Generation
from heapr.evaluation.zero_shot import ZeroShot
from heapr.experiment import Experiment
from heapr.placement import memory_stages
from heapr.steps import Step, Steps
from heapr.text.mixture import identities_of_parts
from heapr.text.splits import share_text
from heapr.text.windows import draw
from heapr.types import TokenWindows

logger = logging.getLogger(__name__)


def make_ready(experiment: Experiment) -> TokenWindows | None:
    """Set the number of threads, and check weights, disk, text and tasks of the steps yet to be made.

    Returns:
        the calibration tokens; None if the calibration is in the store.

    Raises:
        ConfigError: a step cannot be made as asked; the message says why.
    """
    ranks = experiment.ranks
    _tell_allowed_code(experiment)
    missing = [step for step in experiment.steps if not experiment.store.has(step.origin, step.part)]
    if missing and ranks.is_first:
        experiment.store.check_writable()
    if experiment.config.runtime.num_threads is not None:
        torch.set_num_threads(experiment.config.runtime.num_threads)
    is_calibrated = experiment.store.has(experiment.steps.first("calibrate").origin)
    if ranks.size > 1 and missing and not ranks.of_first(experiment.source.has_weights):
        with ranks.in_turn():
            experiment.source.fetch()
    if experiment.source.has_weights:  # otherwise they are fetched, and checked, when the model is loaded
        _ = experiment.source.remarks
        for note in experiment.notes_on_heads:
            logger.info("%-9s %s", "prune", note)
    for note in experiment.notes_on_budget:
        logger.info("%-9s %s", "prune", note)
    _check_placement(missing, experiment)
    _check_space(missing, experiment)
    _warn_of_overlap(experiment.steps)
    measurements = [step.measurement for step in missing if step.measurement is not None]
    # One measurement may belong to several steps.
    distinct = {id(measurement): measurement for measurement in measurements}
    with ranks.in_turn():
        # First, because here a mistake is the likeliest.
        tokens = None if is_calibrated else _calibration_tokens(experiment)
        for measurement in distinct.values():
            measurement.prepare(experiment.source)
            if experiment.placement.is_streamed and isinstance(measurement, ZeroShot | Generation):
                measurement.refuse_generation()
        return tokens


def _tell_allowed_code(experiment: Experiment) -> None:
    """Log whose code, besides heapr's, this run may execute."""
    config = experiment.config
    if config.plugins.allow:
        packages = ", ".join(config.plugins.allow)
        logger.info("%-9s code of package %s is allowed (plugins.allow)", "run", packages)
    if config.model.trust_remote_code:
        folder = experiment.source.folder
        logger.info("%-9s Python code in '%s' is trusted (model.trust_remote_code)", "run", folder)


def _check_placement(missing: Sequence[Step], experiment: Experiment) -> None:
    """Check that model, activations and tape fit where they will be, and say where that is.

    Raises:
        ConfigError: they do not.
    """
    placement = experiment.placement
    if not missing:
        return
    if placement.why is not None:
        logger.info("%-9s %s", "run", placement.why)
    if experiment.left_out:
        names = ", ".join(experiment.left_out)
        logger.info("%-9s %s: left out, because a streamed model waits for the disk", "evaluate", names)
    placement.check(experiment.device, memory_stages(missing))
    is_calibrated = all(step.kind != "calibrate" for step in missing)
    if placement.is_streamed and placement.on_disk and not is_calibrated:
        instead = "keep them in memory with runtime.activations=ram"
        num_bytes = placement.tape_bytes * experiment.ranks.size
        experiment.store.check_space(num_bytes, "activations between the layers", instead)


def _check_space(missing: Sequence[Step], experiment: Experiment) -> None:
    """Check that the disk has room for repaired weights (at least the columns of W_down) and checkpoint.

    Raises:
        ConfigError: it does not.
    """
    source = experiment.source
    routed = 0
    for index, width_E in source.widths.items():
        routed += sum(width_E) * source.atomic_expert_parameters[index]
    num_parameters = 0
    for step in missing:
        if step.kind not in {REPAIR_PART, CHECKPOINT_PART}:
            continue
        kept = round((1 - step.origin.config["ratio"]) * routed)
        if step.kind == REPAIR_PART:
            num_parameters += kept // 3
        else:
            total = sum(parameter.numel() for parameter in source.on_meta().model.parameters())
            is_masked = experiment.config.pruning.form == "masked"
            num_parameters += total if is_masked else total - routed + kept
    instead = "leave the checkpoint out with pruning.save_checkpoint=false"
    experiment.store.check_space(num_parameters * source.dtype.itemsize, "the pruned weights", instead)


def _warn_of_overlap(steps: Steps) -> None:
    """Warn if a text that is measured on has documents in common with the calibration text."""
    calibration = steps.first("calibrate").origin.config["corpus"]
    calibrated = [corpus for corpus, _ in identities_of_parts(calibration)]
    evaluations = [step.origin.config["evaluator"] for step in steps if step.kind == "evaluate"]
    measured = [evaluation["corpus"] for evaluation in evaluations if evaluation.get("corpus")]
    shared = [corpus["corpus"] for corpus in measured for part in calibrated if share_text(part, corpus)]
    for name in dict.fromkeys(shared):
        logger.warning(
            "%s is measured on text that is calibrated on; choose another split for one of them, such as"
            " train and heldout",
            name,
        )


def _calibration_tokens(experiment: Experiment) -> TokenWindows:
    settings, text = experiment.config.calibration, experiment.plugins.text
    assert text is not None, "only a dry run continues without the text"
    return draw(
        text,
        experiment.source.tokenizer,
        length=settings.sequence_length,
        num_samples=settings.num_samples,
        seed=settings.seed,
        max_characters=settings.max_characters,
    )
