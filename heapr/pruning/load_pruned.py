"""Load a pruned model in one line, from a checkpoint or from the dense model and a plan. For library users.

In: folders. Out: a transformers model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from heapr.errors import ConfigError
from heapr.files import hash_file, is_name
from heapr.model.device import find_device
from heapr.model.experts.ragged import RaggedExperts
from heapr.model.find_model import find_model
from heapr.model.load import ModelSource
from heapr.model.ragged_type import take_ragged_type
from heapr.pruning.surgery import remove
from heapr.types import Plan, Pruning, TensorDict

# Shape and dtype of each layer's tensor in a plan.
Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


def load_pruned(
    path: str | Path,
    *,
    plan: str | Path | None = None,
    dtype: str | None = None,
    device: str = "cpu",
) -> PreTrainedModel:
    """Load a pruned model that is ready to generate. No code in its folder is executed.

    Args:
        path: a checkpoint that `prune` wrote, in any form; with `plan`, the dense model that the plan was
            made for.
        plan: a plan.safetensors, applied to the dense model in memory. If the prune step repaired the
            remaining weights, its repaired.safetensors must be in the same folder.
        dtype: float32, bfloat16 or float16. None takes the dtype of the weights.
        device: auto, cpu, cuda or cuda:<number>.

    Raises:
        ConfigError: the model or device does not exist, weights are damaged, or the plan belongs to another
            model.
    """
    place = find_device(device, "device")
    source = find_model(str(path), dtype=dtype)
    pruning = None if plan is None else find_pruning(Path(plan), source)
    model = source.load(place)
    if pruning is not None:
        remove(model, pruning.plan, pruning.repaired)
        widths = {layer.name: layer.widths for layer in model.layers}
        take_ragged_type(model.model, widths)
    return model.model


def find_pruning(path: Path, source: ModelSource) -> Pruning:
    """Read a plan and the repaired weights beside it, and check that they belong to a model.

    Raises:
        ConfigError: a file is damaged or missing, or was made for other shapes or other weights.
    """
    tensors, metadata = _read(path, "plan")
    made_for = _made_for(path, metadata)
    plan = _checked(path, tensors, made_for, source)
    if "repaired" not in metadata:
        return Pruning(plan)
    name = metadata["repaired"]
    if not is_name(name):
        raise ConfigError(
            f"plan '{path}' cannot be read: its repaired weights '{name:.100}' are not beside it; give"
            f" the {path.name} that prune wrote"
        )
    beside = path.with_name(name)
    if not beside.is_file():
        raise ConfigError(
            f"plan '{path}' belongs to a repaired model, but its weights '{beside.name}' are not beside it; "
            "load the checkpoint instead, or give the plan in the folder that prune wrote"
        )
    repaired_tensors, belongs_to = _read(beside, "repaired weights")
    if belongs_to.get("plan") != hash_file(path):
        raise ConfigError(
            f"'{beside}' was made for another plan than '{path}'; give the two files of one prune artifact"
        )
    if not _fit(repaired_tensors, plan, source):
        raise ConfigError(f"'{beside}' does not fit plan '{path}'; give the two files of one prune artifact")
    for key, tensor in repaired_tensors.items():
        if not tensor.isfinite().all():
            raise ConfigError(f"'{beside}' holds NaN or infinite weights in {key}; prune and repair again")
    return Pruning(plan, Pruning.repaired_from_tensors(repaired_tensors))


def _made_for(path: Path, metadata: Mapping[str, str]) -> dict[str, str]:
    """The identity of the model that a plan was made for.

    Raises:
        ConfigError: the plan's metadata are damaged.
    """
    try:
        identity = json.loads(metadata.get("model", "{}"))
    except (ValueError, RecursionError):
        identity = None
    if not isinstance(identity, dict):
        raise ConfigError(
            f"plan '{path}' cannot be read: its metadata are damaged; give the {path.name} that prune wrote"
        )
    return identity


def _fit(repaired: TensorDict, plan: Plan, source: ModelSource) -> bool:
    """Whether repaired weights have the names, shapes and kind of numbers that a plan leaves."""
    found: dict[str, tuple[int, ...]] = {}
    for key, tensor in repaired.items():
        if not tensor.is_floating_point():
            return False
        found[key] = tuple(tensor.shape)
    expected: dict[str, tuple[int, ...]] = {}
    with_repair = {key.rpartition(".")[2] for key in found}
    for layer in source.on_meta().layers:
        width_E = plan.widths[layer.index]
        for name, parameter in RaggedExperts(layer.experts, list(width_E)).named_parameters():
            if name in with_repair:
                expected[f"layers.{layer.index}.{name}"] = tuple(parameter.shape)
    return "down_proj" in with_repair and found == expected


def _read(path: Path, what: str) -> tuple[TensorDict, dict[str, str]]:
    """Tensors and metadata of a safetensors file."""
    try:
        if path.exists() and not path.is_file():
            raise OSError("it is not a file")  # a pipe would be waited for
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            return tensors, file.metadata() or {}
    except (OSError, SafetensorError) as error:
        advice = f"give the {path.name} that prune wrote"
        raise ConfigError(f"{what} '{path}' cannot be read: {error}; {advice}") from error


def _checked(path: Path, tensors: TensorDict, made_for: Mapping[str, str], source: ModelSource) -> Plan:
    """Return the plan if it belongs to the model.

    Raises:
        ConfigError: it does not.
    """
    shapes: Shapes = {}
    for name, tensor in tensors.items():
        shapes[name] = (tuple(tensor.shape), tensor.dtype)
    expected = _expected_shapes(source)
    if shapes != expected:
        difference = f"it has {_described(shapes)}, the model {_described(expected)}"
        raise ConfigError(f"plan '{path}' does not fit: {difference}; give its own plan")
    identity = _without_dtype(source.identity)
    if _without_dtype(made_for) != identity:
        raise ConfigError(
            f"plan '{path}' was made for other weights ({made_for}) than those in '{source.folder}' "
            f"({identity}); give its own plan"
        )
    emptied = [name for name, kept_EF in tensors.items() if not kept_EF.any()]
    if emptied:
        raise ConfigError(
            f"plan '{path}' removes every atomic expert of {emptied[0]}, which prune never does; give its own"
            " plan"
        )
    plan = Plan.from_tensors(tensors)
    for index, width_E in source.widths.items():
        if _keeps_absent(plan.layers[index], width_E):
            reason = f"keeps atomic experts of layer {index} that the model does not have"
            raise ConfigError(f"plan '{path}' {reason}; give its own plan")
    return plan


def _expected_shapes(source: ModelSource) -> Shapes:
    """What the plans of a model have."""
    expected: Shapes = {}
    for index, width_E in source.widths.items():
        shape = (len(width_E), max(width_E))
        expected[f"layers.{index}"] = (shape, torch.bool)
    return expected


def _keeps_absent(kept_EF: Tensor, width_E: Sequence[int]) -> bool:
    """Whether a mask keeps anything beyond an expert's width."""
    position_F = torch.arange(max(width_E))
    width_E1 = torch.tensor(width_E).unsqueeze(1)
    is_absent_EF = position_F >= width_E1
    wrongly_kept_EF = kept_EF & is_absent_EF
    return bool(wrongly_kept_EF.any())


def _without_dtype(identity: Mapping[str, str]) -> dict[str, str]:
    """What identifies the weights, in whichever dtype they are loaded."""
    return {name: value for name, value in identity.items() if name != "dtype"}


def _described(shapes: Shapes) -> str:
    """How many layers there are, and their different shapes."""
    kinds = set()
    for shape, dtype in shapes.values():
        name = str(dtype).removeprefix("torch.")
        kinds.add(f"{shape} {name}")
    listed = " and ".join(sorted(kinds))
    return f"{len(shapes)} layers of {listed}"
