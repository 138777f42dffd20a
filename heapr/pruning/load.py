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
from heapr.pruning.surgery import remove
from heapr.types import Plan, Pruning, TensorDict


def load_pruned(path: str | Path, *, plan: str | Path | None = None, dtype: str | None = None, device: str = "cpu") -> PreTrainedModel:
    """Load a pruned model, ready to generate. No code of its folder runs.

    Args:
        path: a checkpoint that `prune` wrote, of any form; with `plan`, the dense model that the plan was made for.
        plan: a plan.safetensors: its atomic experts are removed from the dense model in memory. If the rest was repaired, the
            repaired.safetensors that prune wrote must lie beside it.
        dtype: float32, bfloat16 or float16; none is that of the weights.
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
    return model.model


def find_pruning(path: Path, source: ModelSource) -> Pruning:
    """A plan and the repaired weights beside it, checked against the model that they are to be applied to.

    Raises:
        ConfigError: something is damaged or missing, or made for other shapes or other weights.
    """
    tensors, metadata = _read(path, "plan")
    plan = _checked(path, tensors, json.loads(metadata.get("model", "{}")), source)
    if "repaired" not in metadata:
        return Pruning(plan)
    beside = path.with_name(metadata["repaired"])
    if not beside.is_file():
        raise ConfigError(
            f"plan '{path}' belongs to a repaired model, but its weights '{beside.name}' are not beside it; load the checkpoint instead, "
            "or give the plan in the folder that prune wrote"
        )
    repaired = Pruning.repaired_from_tensors(_read(beside, "repaired weights")[0])
    num_rows = {index: len(tensors["down_proj"]) for index, tensors in repaired.items() if "down_proj" in tensors}
    if num_rows != {index: sum(width_E) for index, width_E in plan.widths.items()}:
        raise ConfigError(f"'{beside}' does not fit plan '{path}'; give the two files of one prune artifact")
    return Pruning(plan, repaired)


def _read(path: Path, what: str) -> tuple[TensorDict, dict[str, str]]:
    """Tensors and metadata of a file of safetensors."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{what} '{path}' cannot be read: {error}; give the {path.name} that prune wrote") from error


def _checked(path: Path, tensors: TensorDict, made_for: Mapping[str, str], source: ModelSource) -> Plan:
    """A plan that is this model's.

    Raises:
        ConfigError: it is not.
    """
    identity = {name: value for name, value in source.identity.items() if name != "dtype"}
    shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    expected = {f"layers.{index}": ((len(width_E), max(width_E)), torch.bool) for index, width_E in source.widths.items()}
    if shapes != expected:
        raise ConfigError(f"plan '{path}' does not fit: it has {_described(shapes)}, the model {_described(expected)}; give its own plan")
    if {name: value for name, value in made_for.items() if name != "dtype"} != identity:
        raise ConfigError(f"plan '{path}' was made for other weights ({made_for}) than those in '{source.folder}' ({identity})")
    plan = Plan.from_tensors(tensors)
    for index, width_E in source.widths.items():
        if any(kept_F[width:].any() for kept_F, width in zip(plan.layers[index], width_E, strict=True)):
            raise ConfigError(f"plan '{path}' keeps atomic experts of layer {index} that the model does not have; give its own plan")
    return plan


def _described(shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> str:
    kinds = sorted({f"{tuple(shape)} {str(dtype).removeprefix('torch.')}" for shape, dtype in shapes.values()})
    return f"{len(shapes)} layers of {' and '.join(kinds)}"
