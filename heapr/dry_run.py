"""Predicts what a run would do and need from the model's config.json alone, on the meta device.

In: an experiment's configuration. Out: `DryRun`, numbers. A text or device that is not on this machine
becomes a note; every other mistake is refused as in a run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from heapr.experiment import Experiment
from heapr.machine_speed import bytes_per_second, flops_per_second
from heapr.model.costs import activation_bytes, calibration_flops
from heapr.model.footprint import interpreter_bytes
from heapr.model.load import ModelSource
from heapr.model.model_files import weight_files
from heapr.model.moe import MoEModel
from heapr.past_seconds import PastSeconds
from heapr.placement import memory_stages
from heapr.prepare import prepare
from heapr.pruning.budget import Budget
from heapr.schema import CalibrationConfig, ExperimentConfig
from heapr.stage_memory import MEMORY_STAGES

MATRIX_ELEMENT_BYTES = 4  # the published procedure's D x D matrices are float32


@dataclass(frozen=True)
class StepState:
    """One step and whether it is done, in JSON types.

    Attributes:
        stage, part, what, key: as in a run's summary; an empty part is the artifact itself.
        cached: whether it is in the store already.
        config: resolved configuration of the stage.
    """

    stage: str
    part: str
    what: str
    key: str
    cached: bool
    config: Mapping[str, Any]

    @property
    def id(self) -> str:
        """A name that no other artifact or part has."""
        return f"{self.key}/{self.part}"


@dataclass(frozen=True)
class DryRun:
    """The predicted numbers of a run.

    Attributes:
        name: a readable name: model, criterion, scope, ratio.
        path, architecture, dtype: the model, its class, and the dtype of its weights.
        ratio, budget, form: share to remove, what it is a share of, and the form of the checkpoint.
        num_layers, num_moe_layers: number of decoder layers, and of those with routed experts.
        num_experts, width: experts per layer and atomic experts per expert, each as (fewest, most).
        experts_per_token: K.
        atomic_experts, parameters: counts of the dense model.
        expert_parameters: how many of its parameters are in routed experts.
        atomic_experts_removed, parameters_removed: by the ratio, before widths are rounded to multiples; None
            if they depend on scores and routing, because the budget does not count atomic experts.
        weight_bytes: all parameters in `dtype`.
        statistics_bytes: size of the calibration statistics, float64; exact.
        matrix_bytes: size of the D x D matrices that the published procedure holds instead, one per expert,
            float32.
        num_samples, batch_size, sequence_length: the calibration's.
        activation_bytes: held between forward and backward of a batch (`heapr.model.costs`); None if not
            known for this family.
        peak_memory: predicted memory of each stage that runs the model, bytes by part.
        bytes_read, tape_bytes: what a streamed calibration reads from the files, and puts on the disk; None
            in memory.
        calibration_flops: forward and backward over all samples; None if not known for this family.
        expected_seconds: for the missing steps like which others were made before; None if there are none.
        estimated_seconds: for the calibration, at least, if it is missing and none like it was made before:
            from its FLOPs and what is read, and this machine's speed; None if it is not known.
        num_expected, num_missing: how many steps that is, and how many are missing.
        stages: in the order of a run; empty if a corpus is missing that keys depend on.
        notes: one line for each thing that is not on this machine, and how a uniform width rounds the ratio.
    """

    name: str
    path: str
    architecture: str
    dtype: str
    ratio: float
    budget: str
    form: str
    num_layers: int
    num_moe_layers: int
    num_experts: tuple[int, int]
    width: tuple[int, int]
    experts_per_token: int
    atomic_experts: int
    atomic_experts_removed: int | None
    parameters: int
    expert_parameters: int
    parameters_removed: int | None
    weight_bytes: int
    statistics_bytes: int
    matrix_bytes: int
    num_samples: int
    batch_size: int
    sequence_length: int
    activation_bytes: int | None
    peak_memory: Mapping[str, Mapping[str, int]]
    bytes_read: int | None
    tape_bytes: int | None
    calibration_flops: int | None
    expected_seconds: float | None
    estimated_seconds: float | None
    num_expected: int
    num_missing: int
    stages: list[StepState]
    notes: list[str]


def dry_run(config: ExperimentConfig) -> DryRun:
    """Predict a run without loading, tokenizing or making anything.

    Args:
        config: checked by `heapr.schema.resolve`.

    Raises:
        ConfigError: the experiment cannot be run; the message says why.
    """
    not_here: list[str] = []
    experiment = prepare(config, not_here)
    source, budget = experiment.source, experiment.budget
    model = source.on_meta()
    stages = step_states(experiment)
    costs = _costs(model, config.calibration)
    return DryRun(
        name=experiment.name,
        path=config.model.path,
        dtype=config.model.dtype,
        ratio=config.pruning.ratio,
        budget=config.pruning.budget,
        form=config.pruning.form,
        experts_per_token=source.experts_per_token,
        num_layers=source.num_layers,
        num_samples=config.calibration.num_samples,
        batch_size=min(config.calibration.batch_size, config.calibration.num_samples),
        sequence_length=config.calibration.sequence_length,
        stages=stages,
        notes=not_here + _notes(experiment),
        **_sizes(model, source, budget),
        **costs,
        **_places(experiment),
        **_time(experiment, stages, costs["calibration_flops"]),
    )


def _notes(experiment: Experiment) -> list[str]:
    """What there is to say about the budget, the model's files, and where things will be."""
    source = experiment.source
    notes = list(experiment.notes_on_budget)
    if source.has_weights:
        notes += source.remarks + experiment.notes_on_heads
    else:
        notes += source.on_quantization
    if "hub" not in source.identity and not source.has_weights:
        notes.append(
            f"'{source.folder}' holds no weights; the keys will change when they are there, because weights"
            " determine results"
        )
    if experiment.placement.why is not None:
        notes.append(experiment.placement.why)
    if experiment.left_out:
        names = ", ".join(experiment.left_out)
        notes.append(f"left out where a model is streamed: {names}")
    return notes


def step_states(experiment: Experiment) -> list[StepState]:
    """Every step in the order of a run; empty if a text is missing that keys depend on."""
    states = []
    for step in experiment.steps:
        origin = step.origin
        is_cached = experiment.store.has(origin, step.part)
        states.append(StepState(origin.stage, step.part, step.what, origin.key, is_cached, origin.config))
    return states


def _sizes(model: MoEModel, source: ModelSource, budget: Budget) -> dict[str, Any]:
    """Counts and bytes that follow from shapes; all exact."""
    layers = model.layers
    parameters = sum(parameter.numel() for parameter in model.model.parameters())
    removed = _num_removed(source, budget)
    num_elements = sum(layer.num_experts * layer.model_width**2 for layer in layers)
    nums_experts = [layer.num_experts for layer in layers]
    widths = [width for layer in layers for width in layer.widths]
    return {
        "architecture": type(model.model).__name__,
        "num_moe_layers": len(layers),
        "num_experts": (min(nums_experts), max(nums_experts)),
        "width": (min(widths), max(widths)),
        "atomic_experts": source.num_atomic_experts,
        "atomic_experts_removed": removed,
        "parameters": parameters,
        "expert_parameters": sum(layer.num_parameters for layer in layers),
        "parameters_removed": None if removed is None else removed * layers[0].atomic_expert_parameters,
        "weight_bytes": parameters * source.dtype.itemsize,
        "matrix_bytes": num_elements * MATRIX_ELEMENT_BYTES,
    }


def _num_removed(source: ModelSource, budget: Budget) -> int | None:
    """Number of atomic experts that are removed; None if that depends on scores and statistics."""
    width = budget.uniform_width
    if width is not None:
        return sum(old - width for width_E in source.widths.values() for old in width_E)
    return sum(budget.numbers_removed(source.widths)) if budget.unit == "atomic_experts" else None


def sequence_flops(model: MoEModel, length: int) -> int | None:
    """FLOPs of calibrating on one sequence; None if the family's layers do not run on the meta device.

    Args:
        model: on the meta device.
        length: tokens of the sequence.
    """
    try:
        return calibration_flops(model, length)
    except RuntimeError:  # a layer reads values, which the meta device does not have
        return None


def _places(experiment: Experiment) -> dict[str, Any]:
    """Memory of the statistics and of the stages; what the calibration reads, and the disk that it takes."""
    placement = experiment.placement
    beside = {"interpreter": interpreter_bytes()} if experiment.device.type == "cpu" else {}
    stages = memory_stages(experiment.steps) or MEMORY_STAGES
    memory = {stage: placement.peak_bytes(stage) | beside for stage in stages}
    on_disk = placement.is_streamed and placement.on_disk
    return {
        "statistics_bytes": placement.statistics,
        "peak_memory": memory,
        "bytes_read": placement.bytes_read if placement.is_streamed else None,
        "tape_bytes": placement.tape_bytes if on_disk else None,
    }


def _time(experiment: Experiment, stages: Sequence[StepState], flops: int | None) -> dict[str, Any]:
    """Expected time of what is missing, from what was made before; an estimate of a calibration like none."""
    missing = [stage for stage in stages if not stage.cached]
    past = PastSeconds(experiment.store.root)
    expected = [past.expected(stage, model=stages[0].config["model"]) for stage in missing]
    known = [seconds for seconds in expected if seconds is not None]
    is_new = False
    for stage, seconds in zip(missing, expected, strict=True):
        is_new |= stage.stage == "calibrate" and seconds is None
    return {
        "expected_seconds": sum(known) if known else None,
        "estimated_seconds": _estimated_seconds(experiment, flops) if is_new else None,
        "num_expected": len(known),
        "num_missing": len(missing),
    }


def _estimated_seconds(experiment: Experiment, flops: int | None) -> float | None:
    """The calibration's time, if all of it were products like an expert's, and reading.

    None if FLOPs are not known, or the device that is asked for is not on this machine.
    """
    placement, source, device = experiment.placement, experiment.source, experiment.device
    is_here = experiment.config.runtime.device in {"auto", str(device)}
    if flops is None or not is_here:
        return None
    layer = source.on_meta().layers[0]
    shape = (placement.sizes.expert_tokens, layer.model_width, layer.width)
    seconds = placement.work_ratio * flops / flops_per_second(device, source.dtype, shape)
    files = [source.folder / name for name in weight_files(source.folder)]
    speed = bytes_per_second(files)
    if speed is not None:
        num_bytes = placement.bytes_read if placement.is_streamed else placement.sizes.weights
        seconds += num_bytes / speed
    return seconds


def _costs(model: MoEModel, calibration: CalibrationConfig) -> dict[str, Any]:
    """FLOPs of the calibration and bytes of a batch; None where they are not known."""
    batch_size = min(calibration.batch_size, calibration.num_samples)
    flops = sequence_flops(model, calibration.sequence_length)
    if flops is None:
        return {"calibration_flops": None, "activation_bytes": None}
    held = activation_bytes(model, batch_size, calibration.sequence_length)
    return {"calibration_flops": calibration.num_samples * flops, "activation_bytes": held}
