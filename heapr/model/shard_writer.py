"""A model's weights into the files of a Hugging Face folder, with one decoder layer in memory at a time.

In: a model, dense or pruned, in memory or streamed. Out: safetensors files, and their index if there are
several.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from heapr.files import write_json
from heapr.model.model_files import INDEX
from heapr.model.moe import MoEModel
from heapr.model.shards import Shards
from heapr.tensors_file import TensorsFile

PATTERN = "model{suffix}.safetensors"
METADATA = {"format": "pt"}  # of every file

State = dict[str, Tensor]


@dataclass(frozen=True)
class Carried:
    """Tensors of other files, which are copied unchanged.

    Attributes:
        folder: with the files.
        names: of the tensors in them, and in the copy.
    """

    folder: Path
    names: Sequence[str]


NOTHING = Carried(Path(), ())


def write_weights(
    model: MoEModel, folder: Path, *, max_shard_size: str, by_family: bool, carried: Carried = NOTHING
) -> None:
    """Write all weights but tied ones, which loading ties again.

    Of a family that transformers lacks, they are written too: other tools have a class of their own for it,
    and vLLM's does not tie.

    Args:
        folder: is there.
        max_shard_size: of a file, as huggingface_hub takes it.
        by_family: tensors are written under the names and in the shapes of the family's published
            checkpoints, otherwise as the model has them.
        carried: written beside the model's own.
    """
    others = Shards(carried.folder) if carried.names else None
    tied = _left_out(model, by_family=by_family)
    shapes: State = {}
    for state in _parts(model, tied, in_memory=False):
        shapes |= _as_written(model, state, by_family=by_family)
    for name in carried.names:
        assert others is not None and name not in shapes
        place = others.place(name)
        shapes[name] = torch.empty(place.shape, dtype=place.dtype, device="meta")
    split = split_torch_state_dict_into_shards(
        shapes, filename_pattern=PATTERN, max_shard_size=max_shard_size
    )
    files = {}
    for file_name, names in split.filename_to_tensors.items():
        of_file = {name: shapes[name] for name in names}
        files[file_name] = TensorsFile(folder / file_name, of_file, METADATA)
    for state in _parts(model, tied, in_memory=True):
        for name, tensor in _as_written(model, state, by_family=by_family).items():
            file_name = split.tensor_to_filename[name]
            files[file_name].write(name, tensor)
    for name in carried.names:
        assert others is not None
        files[split.tensor_to_filename[name]].write(name, others.read(name))
    if split.is_sharded:
        weight_map = dict(sorted(split.tensor_to_filename.items()))
        write_json(folder / INDEX, {"metadata": split.metadata, "weight_map": weight_map})


def _left_out(model: MoEModel, *, by_family: bool) -> set[str]:
    """Names of the tied weights that are not written."""
    is_of_transformers = type(model.model).__module__.startswith("transformers.")
    if by_family and not is_of_transformers:
        return set()
    tied = getattr(model.model, "all_tied_weights_keys", None)
    return set(tied or {})


def _parts(model: MoEModel, tied: Collection[str], *, in_memory: bool) -> Iterator[State]:
    """What lies beside the decoder layers, then layer after layer."""
    prefix = f"{model.layers_name}."
    names = [name for name in model.model.state_dict() if name not in tied]
    beside = [name for name in names if not name.startswith(prefix)]
    yield _state_of(model, beside, in_memory=in_memory)
    for layer in range(len(model.decoder_layers)):
        of_layer = [name for name in names if name.startswith(f"{prefix}{layer}.")]
        with model.hold([layer] if in_memory else []):
            yield _state_of(model, of_layer, in_memory=in_memory)


def _state_of(model: MoEModel, names: Sequence[str], *, in_memory: bool) -> State:
    """Tensors, or what has their shapes without memory."""
    everything = model.model.state_dict()
    if in_memory:
        return {name: everything[name].cpu() for name in names}
    return {name: torch.empty_like(everything[name], device="meta") for name in names}


def _as_written(model: MoEModel, state: State, *, by_family: bool) -> State:
    ignored = set(model.model._keys_to_ignore_on_save or ())
    state = {name: tensor for name, tensor in state.items() if name not in ignored}
    if by_family:
        state = revert_weight_conversion(model.model, state)
    return state
