"""What a run would do, need and take, without weights, tokenizer or text: from the model's config.json, on
the meta device.

In: an experiment's configuration. Out: `DryRun`, numbers. What is not on this machine (text, a device)
becomes a note; every other mistake is refused as in a run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from heapr.experiment import Experiment, prepare
from heapr.model.costs import activation_bytes, calibration_flops
from heapr.model.load import ModelSource
from heapr.model.moe import MoEModel
from heapr.pruning.budget import Budget
from heapr.schema import CalibrationConfig, ExperimentConfig
from heapr.types import LayerStatistics

MATRIX_ELEMENT_BYTES = 4  # the published procedure's D x D matrices are float32


@dataclass(frozen=True)
class StepState:
    """A step as it stands, in JSON types.

    Attributes:
        stage, part, what, key: as a run's summary tells them; a part is made by itself and kept with the
            whole.
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
        """Of the artifact or part, different from all others."""
        return f"{self.key}/{self.part}"


@dataclass(frozen=True)
class DryRun:
    """The numbers of a run that is not made.

    Attributes:
        name: readable: model, criterion, scope, ratio.
        path, architecture, dtype: the model, its class, and its weights' dtype.
        ratio, budget, form: share to remove, of what, and how the checkpoint holds what is left.
        num_layers, num_moe_layers: decoder layers, and those with routed experts.
        num_experts, width: experts of a layer, atomic experts of an expert: the fewest and the most.
        experts_per_token: K.
        atomic_experts, parameters, expert_parameters: of the dense model; the last in routed experts.
        atomic_experts_removed, parameters_removed: by the ratio, before widths are rounded to multiples; none
            where the budget is not of atomic experts, so that scores and routing decide.
        weight_bytes: all parameters in `dtype`.
        statistics_bytes: of the calibration statistics, float64; exact.
        matrix_bytes: of the D x D matrices that the published procedure holds instead, one per expert,
            float32.
        num_samples, batch_size, sequence_length: of the calibration.
        activation_bytes: held between forward and backward of a batch (`heapr.model.costs`); none if not
            known for this family.
        calibration_flops: forward and backward over all samples; none if not known for this family.
        stages: in the order of a run; empty if a corpus is missing on which keys depend.
        notes: one line each: what is not on this machine, and what a uniform width makes of the ratio.
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
    calibration_flops: int | None
    stages: list[StepState]
    notes: list[str]


def dry_run(config: ExperimentConfig) -> DryRun:
    """Tell a run; nothing is loaded, tokenised or made.

    Args:
        config: checked by `heapr.schema.resolve`.

    Raises:
        ConfigError: the user's mistake.
    """
    notes: list[str] = []
    experiment = prepare(config, notes)
    source, budget = experiment.source, experiment.budget
    notes += experiment.notes_on_budget
    model = source.on_meta()
    notes += source.left_out if source.has_weights else []
    if "hub" not in source.identity and not source.has_weights:
        notes.append(
            f"'{source.folder}' holds no weights; with them the keys will be others, because weights"
            " determine results"
        )
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
        stages=step_states(experiment),
        notes=notes,
        **_sizes(model, source, budget),
        **_costs(model, config.calibration),
    )


def step_states(experiment: Experiment) -> list[StepState]:
    """Every step in the order of a run; none if a text is missing on which keys depend."""
    store = experiment.store
    return [
        StepState(
            step.origin.stage,
            step.part,
            step.what,
            step.origin.key,
            store.has(step.origin, step.part),
            step.origin.config,
        )
        for step in experiment.steps
    ]


def _sizes(model: MoEModel, source: ModelSource, budget: Budget) -> dict[str, Any]:
    """Counts and bytes that follow from shapes; all exact."""
    layers = model.layers
    parameters = sum(parameter.numel() for parameter in model.model.parameters())
    removed = _num_removed(source, budget)
    statistics = [
        LayerStatistics.zeros(layer.num_experts, layer.width, torch.device("meta")) for layer in layers
    ]
    return {
        "architecture": type(model.model).__name__,
        "num_moe_layers": len(layers),
        "num_experts": _range_of([layer.num_experts for layer in layers]),
        "width": _range_of([width for layer in layers for width in layer.widths]),
        "atomic_experts": source.num_atomic_experts,
        "atomic_experts_removed": removed,
        "parameters": parameters,
        "expert_parameters": sum(layer.num_parameters for layer in layers),
        "parameters_removed": None if removed is None else removed * layers[0].atomic_expert_parameters,
        "weight_bytes": parameters * source.dtype.itemsize,
        "statistics_bytes": sum(layer.num_bytes for layer in statistics),
        "matrix_bytes": sum(
            layer.num_experts * layer.model_width**2 * MATRIX_ELEMENT_BYTES for layer in layers
        ),
    }


def _num_removed(source: ModelSource, budget: Budget) -> int | None:
    """Atomic experts that go; none where only scores and statistics can tell."""
    if (width := budget.uniform_width) is not None:
        return sum(old - width for width_E in source.widths.values() for old in width_E)
    return sum(budget.numbers_removed(source.widths)) if budget.unit == "atomic_experts" else None


def sequence_flops(model: MoEModel, length: int) -> int | None:
    """Of calibrating on one sequence; none where the family's layers do not run on the meta device.

    Args:
        model: on the meta device.
        length: of the sequence, in tokens.
    """
    try:
        return calibration_flops(model, length)
    except RuntimeError:  # torch's answer to a layer that wants to read values, which are not there
        return None


def _costs(model: MoEModel, calibration: CalibrationConfig) -> dict[str, Any]:
    """FLOPs of the calibration and bytes of a batch, where they are known."""
    batch_size = min(calibration.batch_size, calibration.num_samples)
    flops = sequence_flops(model, calibration.sequence_length)
    if flops is None:
        return {"calibration_flops": None, "activation_bytes": None}
    held = activation_bytes(model, batch_size, calibration.sequence_length)
    return {"calibration_flops": calibration.num_samples * flops, "activation_bytes": held}


def _range_of(numbers: list[int]) -> tuple[int, int]:
    return min(numbers), max(numbers)
