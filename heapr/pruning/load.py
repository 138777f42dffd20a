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
from heapr.model.load import ModelSource, find_model
from heapr.pruning.surgery import remove
from heapr.types import Plan


def load_pruned(path: str | Path, *, plan: str | Path | None = None, dtype: str | None = None, device: str = "cpu") -> PreTrainedModel:
    """Load a pruned model, ready to generate. No code of its folder runs.

    Args:
        path: a checkpoint that `prune` wrote, of any form; with `plan`, the dense model that the plan was made for.
        plan: a plan.safetensors: its atomic experts are removed from the dense model in memory.
        dtype: float32, bfloat16 or float16; none is that of the weights.
        device: where it goes.

    Raises:
        ConfigError: no such model, damaged weights, or a plan that is not this model's.
    """
    source = find_model(str(path), dtype=dtype)
    kept = None if plan is None else read_plan(Path(plan), source)
    model = source.load(torch.device(device))
    if kept is not None:
        remove(model, kept)
    return model.model


def read_plan(path: Path, source: ModelSource) -> Plan:
    """A plan, checked against the model that it is to be applied to.

    Raises:
        ConfigError: it is damaged, or made for other shapes or other weights.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            made_for = json.loads((file.metadata() or {}).get("model", "{}"))
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"plan '{path}' cannot be read: {error}; give the plan.safetensors that prune wrote") from error
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
