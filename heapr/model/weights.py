"""A model's weights from its files into memory, one decoder layer at a time, and out again.

In: a model on the meta device, and its folder. Out: the same model. What lies beside its decoder layers is in
memory for good, a layer from `load` to `release`. Tensors go through transformers' own conversion, the one
that `from_pretrained` uses. It needs a model to put them into, which is a twin of the model: so a thread can
read a layer while nobody sees it yet.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    dot_natural_key,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig, LoadStateDictInfo

from heapr.errors import ConfigError
from heapr.model.heap import trim_heap
from heapr.model.quantised import Quantization, conversions_of, forget_conversions
from heapr.model.read_ahead import ReadAhead
from heapr.model.shards import Shards
from heapr.model.tensors import merges_experts, silent, without_cpu

SINGLE = ""  # the group of tensors that are not put together with others
BESIDE = -1  # the part of a model that is in no decoder layer
CPU = torch.device("cpu")


class LayerWeights:
    """The weights of a model that need not fit into memory as a whole.

    Buffers that no file holds are made here, and stay.

    Args:
        model: on the meta device, in the dtype that its weights will have.
        layers: name of its list of decoder layers.
        folder: with its weights.
        device: where they go.
        quantization: how they are quantised in the files; they are dequantised as they are read.
        read_ahead: `will_need` reads a layer in a thread, into the CPU's memory. If false, it only asks the
            operating system to do so.

    Raises:
        ConfigError: tensors are missing or of other shapes, or a layer's are stored together with others'.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: str,
        folder: Path,
        device: torch.device,
        *,
        quantization: Quantization | None = None,
        read_ahead: bool = False,
    ) -> None:
        self.device = device
        self.shards = Shards(folder)
        self._model = model
        self._ahead = ReadAhead(self._converted) if read_ahead else None
        self._layers = layers
        self._quantization = quantization
        self._conversions, self._quantizer = conversions_of(model, quantization)
        self._merges: dict[str, dict[str, list[str]]] = {}
        self._loaded: dict[int, list[str]] = {}  # names of what a part has in the files
        self._sources = self._sources_by_part()
        self._empty = self._check_parts()
        self._twin = copy.deepcopy(model)
        self._load_beside()

    @property
    def num_layers(self) -> int:
        return len(self._model.get_submodule(self._layers))

    def load(self, layer: int) -> None:
        """Read a decoder layer into memory, or take what was read ahead. Its parameters need no gradient.

        Raises:
            ConfigError: its files have changed.
        """
        tensors = None if self._ahead is None else self._ahead.take(layer)
        if tensors is None:
            tensors = self._converted(layer)
        for (module, name, _), tensor in zip(self._empty[layer], tensors, strict=True):
            # Does not wait if the tensor is in pinned memory.
            on_device = tensor.to(self.device, non_blocking=True)
            is_parameter = name in module._parameters
            setattr(module, name, nn.Parameter(on_device, requires_grad=False) if is_parameter else on_device)
        decoder_layer = self._model.get_submodule(f"{self._layers}.{layer}")
        decoder_layer.to(self.device).requires_grad_(False)

    def release(self, layer: int, within: nn.Module | None = None) -> None:
        """Give back the memory of what the files hold of a decoder layer, or of one module in it."""
        modules = None if within is None else set(within.modules())
        for module, name, empty in self._empty[layer]:
            if modules is None or module in modules:
                setattr(module, name, empty)
        trim_heap()

    def will_need(self, layer: int) -> None:
        """Say that this layer will be read next."""
        if self._ahead is None:
            self.shards.will_need(self._names(layer))
        else:
            self._ahead.start(layer)

    def num_bytes(self, layer: int) -> int:
        """What reading a layer takes from the files; with `BESIDE`, what lies beside the layers."""
        return sum(self.shards.place(name).num_bytes for name in self._names(layer))

    def _names(self, part: int) -> Iterator[str]:
        """A part's tensors in the files."""
        for names in self._sources[part].values():
            yield from names

    def _sources_by_part(self) -> dict[int, dict[str, list[str]]]:
        """The tensors in the files, by the part that takes them and by group: tensors that become one tensor
        of the model are in a group of its name, all others in `SINGLE`."""
        known = self._model.state_dict()
        renamings = [each for each in self._conversions if isinstance(each, WeightRenaming)]
        converters = [each for each in self._conversions if isinstance(each, WeightConverter)]
        prefix = self._model.base_model_prefix
        parts: dict[int, dict[str, list[str]]] = {part: {} for part in range(BESIDE, self.num_layers)}
        converter_of = {pattern: each for each in converters for pattern in each.source_patterns}
        # In transformers' order, because some renamings depend on what came before.
        for source in sorted(self.shards, key=dot_natural_key):
            target, pattern = rename_source_key(source, renamings, converters, prefix, known)
            if target not in known and source in known:
                target, pattern = rename_source_key(source, [], [], prefix, known)
            if target not in known:
                continue
            group = SINGLE if pattern is None else target
            groups = parts[self._part_of(target)]
            groups.setdefault(group, []).append(source)
            if pattern is not None and merges_experts(converter_of[pattern]):
                order = converter_of[pattern].source_patterns
                none: dict[str, list[str]] = {each: [] for each in order}
                merge = self._merges.setdefault(target, none)
                merge[pattern].append(source)
        return parts

    def _part_of(self, target: str) -> int:
        """The decoder layer of a tensor of the model, or `BESIDE`."""
        prefix = f"{self._layers}."
        if not target.startswith(prefix):
            return BESIDE
        number, _, _ = target.removeprefix(prefix).partition(".")
        return int(number)

    def _check_parts(self) -> dict[int, list[tuple[nn.Module, str, Tensor]]]:
        """Load every part on the meta device.

        Returns:
            by part, the tensors without memory that stand for what the files hold.

        Raises:
            ConfigError: see the class.
        """
        empty: dict[int, list[tuple[nn.Module, str, Tensor]]] = {}
        self._absent: set[str] = set(self._model.state_dict())
        for part in self._sources:
            loaded = self._load(self._model, part, on_meta=True)
            foreign = sorted(name for name in loaded if self._part_of(name) != part)
            if foreign:
                raise ConfigError(
                    f"runtime.stream=true: the files of {type(self._model).__name__} hold {foreign[0]}"
                    " together with other layers' weights, so one layer cannot be read by itself; give"
                    " runtime.stream=false"
                )
            self._absent -= loaded
            names = self._loaded[part] = sorted(loaded)
            empty[part] = [_place_of(self._model, name) for name in names]
        return empty

    @torch.no_grad()
    def _converted(self, layer: int) -> list[Tensor]:
        """A layer's tensors in the CPU's memory, in the order of `_loaded`; for a GPU in pinned memory."""
        self._load(self._twin, layer)
        tensors = []
        for name, (_, _, empty) in zip(self._loaded[layer], self._empty[layer], strict=True):
            module, tensor_name, tensor = _place_of(self._twin, name)
            content = tensor.detach()
            tensors.append(content.pin_memory() if self.device.type == "cuda" else content)
            del tensor, content
            setattr(module, tensor_name, empty)
        return tensors

    def _load_beside(self) -> None:
        """Load what lies beside the layers, tie what is tied, and make what no file holds, as
        `from_pretrained` does."""
        config = self._config(self.device)
        info = LoadStateDictInfo(set(self._absent), set(), set(), [], {}, set())
        with silent():
            for group, names in self._sources[BESIDE].items():
                tensors = self._read(group, names)
                convert_and_load_state_dict_in_model(self._model, tensors, config)
                del tensors
            info = self._model._finalize_model_loading(self._model, config, info)
        if info.missing_keys:
            missing = sorted(info.missing_keys)
            raise ConfigError(
                f"the weights of {type(self._model).__name__} do not fit its config.json: missing keys"
                f" {missing[0]} and {len(missing) - 1} more; get them again"
            )
        forget_conversions(self._model, self._quantization)
        self._model.requires_grad_(False)

    def _load(self, model: PreTrainedModel, part: int, *, on_meta: bool = False) -> set[str]:
        """Load a part into a model, one group after the other, so that what is being put together is in
        memory twice, and no more than that.

        Returns:
            names of what was loaded.
        """
        config = self._config(torch.device("meta") if on_meta else CPU)
        loaded: set[str] = set()
        for group, names in self._sources[part].items():
            if group in self._merges and not on_meta:
                self._merge(model, group)
                continue
            tensors = self._on_meta(names) if on_meta else self._read(group, names)
            with silent():
                info, _ = convert_and_load_state_dict_in_model(model, tensors, config)
            del tensors
            problems = [*map(str, info.mismatched_keys), *info.conversion_errors.values()]
            if problems:
                raise ConfigError(
                    f"the weights of {type(model).__name__} do not fit its config.json: {problems[0]}"
                )
            loaded |= model.state_dict().keys() - info.missing_keys
        forget_conversions(model, self._quantization)
        return loaded

    def _merge(self, model: PreTrainedModel, target: str) -> None:
        """Read single experts' matrices into the tensor of all: each expert's [W_gate; W_up], or its W_down.

        transformers' conversion does the same, and needs that tensor's memory three times.
        """
        module, name, empty = _place_of(model, target)
        merged = torch.empty(empty.shape, dtype=empty.dtype)
        first = 0
        for sources in self._merges[target].values():
            for expert, source in enumerate(sources):
                matrix = self.shards.read(source)
                merged[expert, first : first + len(matrix)] = matrix
            first += len(matrix)
        setattr(module, name, nn.Parameter(merged, requires_grad=False))

    def _config(self, device: torch.device) -> LoadStateDictConfig:
        conversions, dtype = self._conversions, self._model.dtype
        if device.type == "meta":
            conversions = without_cpu(conversions)
        return LoadStateDictConfig(
            device_map={"": device},
            dtype=dtype,
            dtype_plan=self._model._get_dtype_plan(dtype),
            weight_mapping=conversions,
            hf_quantizer=self._quantizer,
        )

    def _read(self, group: str, names: Sequence[str]) -> dict[str, Any]:
        """A group's tensors: those that are put together are read now, others when they are taken."""
        if group == SINGLE:
            return {name: _Lazy(self.shards, name) for name in names}
        return dict(self.shards.read_together(names))

    def _on_meta(self, names: Iterable[str]) -> dict[str, Any]:
        tensors = {}
        for name in names:
            place = self.shards.place(name)
            tensors[name] = torch.empty(place.shape, dtype=place.dtype, device="meta")
        return tensors


def _place_of(model: PreTrainedModel, name: str) -> tuple[nn.Module, str, Tensor]:
    """The module that has a tensor, its name there, and the tensor."""
    module_name, _, tensor_name = name.rpartition(".")
    module = model.get_submodule(module_name)
    tensor: Tensor = getattr(module, tensor_name)
    return module, tensor_name, tensor


class _Lazy:
    """A tensor in a file, as transformers' loading takes it: read when it is indexed."""

    def __init__(self, shards: Shards, name: str) -> None:
        self._shards, self._name = shards, name

    def __getitem__(self, _: Any) -> Tensor:
        return self._shards.read(self._name)

    def get_dtype(self) -> str:
        """Of safetensors' names, the letter that quantizers look at: F for floating point."""
        return "F" if self._shards.place(self._name).dtype.is_floating_point else "I"
