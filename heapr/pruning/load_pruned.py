"""For library users: a pruned model in one line, from a checkpoint or from the dense model and a plan.

In: folders. Out: a transformers model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from heapr.errors import ConfigError
from heapr.model.device import find_device
from heapr.model.load import ModelSource, find_model
from heapr.model.ragged_type import take_ragged_type
from heapr.pruning.surgery import remove
from heapr.types import Plan, Pruning, TensorDict

Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


def load_pruned(
    path: str | Path,
    *,
    plan: str | Path | None = None,
    dtype: str | None = None,
    device: str = "cpu",
) -> PreTrainedModel:
    """Load a pruned model, ready to generate. No code of its folder runs.

    Args:
        path: a checkpoint that `prune` wrote, of any form; with `plan`, the dense model that the plan was
            made for.
        plan: a plan.safetensors. The atomic experts that it does not keep are removed from the dense model in
            memory. If the others were repaired, the repaired.safetensors that prune wrote must lie beside it.
        dtype: float32, bfloat16 or float16. None takes that of the weights.
        device: where it goes: auto, cpu, cuda or cuda:<number>.

    Raises:
        ConfigError: no such model or device, damaged weights, or a plan that is not this model's.
    """
    place = find_device(device, "device")
    source = find_model(str(path), dtype=dtype)
    pruning = None if plan is None else find_pruning(Path(plan), source)
    model = source.load(place)
    if pruning is not None:
        remove(model, pruning.plan, pruning.repaired)
        take_ragged_type(model.model, {layer.name: layer.widths for layer in model.layers})
    return model.model


def find_pruning(path: Path, source: ModelSource) -> Pruning:
    """A plan and the repaired weights beside it, checked against the model to which they are to be applied.

    Raises:
        ConfigError: something is damaged or missing, or made for other shapes or other weights.
    """
    tensors, metadata = _read(path, "plan")
    made_for = json.loads(metadata.get("model", "{}"))
    plan = _checked(path, tensors, made_for, source)
    if "repaired" not in metadata:
        return Pruning(plan)
    beside = path.with_name(metadata["repaired"])
    if not beside.is_file():
        raise ConfigError(
            f"plan '{path}' belongs to a repaired model, but its weights '{beside.name}' are not beside it; "
            "load the checkpoint instead, or give the plan in the folder that prune wrote"
        )
    repaired_tensors, _ = _read(beside, "repaired weights")
    repaired = Pruning.repaired_from_tensors(repaired_tensors)
    num_rows = {index: len(layer["down_proj"]) for index, layer in repaired.items() if "down_proj" in layer}
    num_kept = {index: sum(width_E) for index, width_E in plan.widths.items()}
    if num_rows != num_kept:
        raise ConfigError(f"'{beside}' does not fit plan '{path}'; give the two files of one prune artifact")
    return Pruning(plan, repaired)


def _read(path: Path, what: str) -> tuple[TensorDict, dict[str, str]]:
    """Tensors and metadata of a file of safetensors."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            return tensors, file.metadata() or {}
    except (OSError, SafetensorError) as error:
        advice = f"give the {path.name} that prune wrote"
        raise ConfigError(f"{what} '{path}' cannot be read: {error}; {advice}") from error


def _checked(path: Path, tensors: TensorDict, made_for: Mapping[str, str], source: ModelSource) -> Plan:
    """The plan, if it is this model's.

    Raises:
        ConfigError: it is not.
    """
    shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    expected: Shapes = {}
    for index, width_E in source.widths.items():
        expected[f"layers.{index}"] = ((len(width_E), max(width_E)), torch.bool)
    if shapes != expected:
        difference = f"it has {_described(shapes)}, the model {_described(expected)}"
        raise ConfigError(f"plan '{path}' does not fit: {difference}; give its own plan")
    if _without_dtype(made_for) != _without_dtype(source.identity):
        raise ConfigError(
            f"plan '{path}' was made for other weights ({made_for}) than those in '{source.folder}' "
            f"({_without_dtype(source.identity)}); give its own plan"
        )
    plan = Plan.from_tensors(tensors)
    for index, width_E in source.widths.items():
        absent_EF = torch.arange(max(width_E)) >= torch.tensor(width_E).unsqueeze(1)
        if (plan.layers[index] & absent_EF).any():
            reason = f"keeps atomic experts of layer {index} that the model does not have"
            raise ConfigError(f"plan '{path}' {reason}; give its own plan")
    return plan


def _without_dtype(identity: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in identity.items() if name != "dtype"}


def _described(shapes: Shapes) -> str:
    kinds = set()
    for shape, dtype in shapes.values():
        kinds.add(f"{shape} {str(dtype).removeprefix('torch.')}")
    return f"{len(shapes)} layers of {' and '.join(sorted(kinds))}"
