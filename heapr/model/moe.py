"""The view of a causal language model that the rest of heapr works with: MoE layers and their weights.

In: a transformers model. Out: `MoEModel`. Knowledge of architectures ends here; a model that needs something
heapr lacks is refused, and the message names the missing capability.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast

from heapr.errors import ConfigError
from heapr.model.experts.dispatch import CAPABILITIES, is_experts
from heapr.model.experts.layout import Experts, is_ragged, layout_of, matrices_of, model_width_of, widths_of
from heapr.model.experts.ragged import RaggedExperts
from heapr.model.residency import InMemory, Residency
from heapr.model.shelf import Shelf
from heapr.types import ExpertWeights

# Names of K in the families' configurations.
TOP_K_FIELDS = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_k")
# In a module's name, what is not the text decoder; text never reaches such experts.
OTHER_PARTS = re.compile(r"vision|visual|audio|speech|talker")
DECODER_LAYER = re.compile(r"\.(\d+)\.")  # in a module's name, such as `model.layers.3.mlp.experts`


@dataclass(frozen=True)
class MoELayer:
    """One MoE layer.

    Attributes:
        index: decoder layer index.
        name: the experts' module name in the model.
        block: the module that owns the experts; they are looked up in it each time, because surgery replaces
            them.
    """

    index: int
    name: str
    block: nn.Module

    @property
    def experts(self) -> Experts:
        return self.block.get_submodule(self.name.rpartition(".")[2])

    def replace_experts(self, experts: RaggedExperts) -> None:
        setattr(self.block, self.name.rpartition(".")[2], experts)

    @property
    def num_experts(self) -> int:
        return int(self.experts.num_experts)

    @property
    def widths(self) -> list[int]:
        """Number of atomic experts of each expert."""
        return widths_of(self.experts)

    @property
    def width(self) -> int:
        """Number of atomic experts of the widest expert."""
        return max(self.widths)

    @property
    def num_parameters(self) -> int:
        """Number of parameters of all routed experts of the layer."""
        return sum(parameter.numel() for parameter in self.experts.parameters())

    @property
    def model_width(self) -> int:
        """D."""
        return model_width_of(self.experts)

    @property
    def atomic_expert_parameters(self) -> int:
        """Number of parameters of an atomic expert: its input rows with their biases, and its column w_k."""
        layout = layout_of(self.experts)
        num_rows = 2 if layout.has_gate else 1
        return num_rows * (self.model_width + layout.has_bias) + self.model_width

    def down_abs_max(self) -> Tensor:
        """max over d of |w_kd|, the largest weight of each column k of W_down, (E, F); zero past an expert's
        width."""
        width = self.width
        largest = []
        for matrices in matrices_of(self.experts):
            down_DF = matrices.down_DF.detach()
            largest_F = down_DF.abs().amax(dim=0)
            largest.append(F.pad(largest_F, (0, width - len(largest_F))))
        return torch.stack(largest)

    def weights(self) -> ExpertWeights:
        """A copy of the experts' weights; experts narrower than the widest are padded with zeros."""
        layout, width = layout_of(self.experts), self.width
        gates, ups, downs = [], [], []
        for matrices in matrices_of(self.experts):
            inputs_GD, down_DF = matrices.inputs_GD.detach(), matrices.down_DF.detach()
            missing = width - down_DF.shape[1]
            up_FD = inputs_GD
            if layout.has_gate:
                gate_FD, up_FD = layout.gate_and_up(inputs_GD)
                gates.append(F.pad(gate_FD, (0, 0, 0, missing)))
            ups.append(F.pad(up_FD, (0, 0, 0, missing)))
            downs.append(F.pad(down_DF, (0, missing)))
        return ExpertWeights(
            gate_EFD=torch.stack(gates) if gates else None,
            up_EFD=torch.stack(ups),
            down_EDF=torch.stack(downs),
        )


class MoEModel:
    """A causal language model with MoE layers.

    Args:
        model: any transformers causal language model whose experts use `use_experts_implementation`.
        residency: which of its layers are in memory. None means all of them.

    Raises:
        ConfigError: the model has no MoE layer, or needs a missing capability, which the message names.
    """

    def __init__(self, model: PreTrainedModel, residency: Residency | None = None) -> None:
        self.model = model.eval()
        self.layers = find_moe_layers(model)
        self.residency: Residency = residency or InMemory()
        self.reads: list[list[int]] | None = None  # see `reads_of`
        self._head = _without_body(model)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.get_input_embeddings().weight.device
        return device

    def hidden_states(self, **inputs: Tensor) -> Tensor:
        """Final hidden states (N, W, D), the input of the output head, on the model's first device."""
        hidden: Tensor = self.body(use_cache=False, **inputs).last_hidden_state
        return hidden.to(self.device)

    @property
    def body(self) -> nn.Module:
        """The child that computes the final hidden states."""
        body: nn.Module = self.model.get_submodule(_body_name(self.model))
        return body

    @property
    def is_ragged(self) -> bool:
        """Whether the experts have individual widths."""
        return is_ragged(self.layers[0].experts)

    @property
    def decoder_layers(self) -> list[nn.Module]:
        """All decoder layers, with and without experts, in order."""
        container = self.model.get_submodule(self.layers_name)
        return list(container.children())

    @property
    def layers_name(self) -> str:
        """Name of the list of decoder layers in the model."""
        return _list_of(self.layers[0])

    @property
    def spans(self) -> list[range]:
        """Decoder layers that are in memory together, from the first to the last."""
        return self.residency.spans(len(self.decoder_layers))

    @property
    def is_streamed(self) -> bool:
        """Whether not all of its layers are in memory."""
        return len(self.spans) > 1

    def hold(self, layers: Sequence[int]) -> AbstractContextManager[None]:
        """A context in which these decoder layers are in memory."""
        return self.residency.hold(layers)

    def shelf(self) -> Shelf:
        """A new place for the outputs of layers."""
        return self.residency.shelf()

    def change(self, layer: MoELayer, change: Callable[[], None]) -> None:
        """Change a layer's experts; see `Residency`."""
        self.residency.change(layer, change)

    def remember(self, layer: MoELayer, change: Callable[[], None]) -> None:
        """Say that a layer in memory has been changed like this; see `Residency`."""
        self.residency.remember(layer, change)

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """Logits (T, V) of final hidden states in float32, by the model's own forward.

        Scaling and capping are included.
        """
        logits: Tensor = self._head(inputs_embeds=hidden_TD.unsqueeze(0), use_cache=False).logits
        return logits.squeeze(0).to(hidden_TD.device, torch.float32)

    def check_head(self) -> None:
        """Refuse models whose logits depend on more than the final hidden states.

        Their losses would be wrong when computed in chunks.

        Raises:
            ConfigError: this model is one of them.
        """
        ids_NW = torch.arange(8, device=self.device).unsqueeze(0)
        bodies: list[Any] = []
        hook = self.body.register_forward_hook(lambda _, __, output: bodies.append(output))
        try:
            with torch.no_grad():
                expected = self.model(input_ids=ids_NW, use_cache=False).logits.float()
        finally:
            hook.remove()
        with torch.no_grad():
            hidden_NWD = bodies[0].last_hidden_state.to(self.device)
            found = self.logits(hidden_NWD[0])
            difference = (found - expected[0]).abs().max()
        # False for NaN, which calibration reports.
        if difference > 1e-2 * expected.abs().max():
            raise ConfigError(
                f"{type(self.model).__name__} needs a missing capability: logits that depend on more than the"
                " final hidden states"
            )


def find_moe_layers(model: PreTrainedModel) -> list[MoELayer]:
    """All MoE layers in order of decoder layer index.

    Raises:
        ConfigError: there is none, or one needs a missing capability.
    """
    layers = []
    for name, module in model.named_modules():
        if not is_experts(module) or OTHER_PARTS.search(name):
            continue
        for attribute, description in CAPABILITIES.items():
            if getattr(module, attribute, False):
                raise ConfigError(f"{type(model).__name__} needs a missing capability: {description}")
        block = model.get_submodule(name.rpartition(".")[0])
        layers.append(MoELayer(index=_layer_index(name), name=name, block=block))
    if not layers:
        raise ConfigError(
            f"{type(model).__name__} has no MoE layer that transformers' experts interface serves; choose a"
            " Mixture-of-Experts model"
        )
    return sorted(layers, key=lambda layer: layer.index)


def layers_name_of(model: PreTrainedModel) -> str:
    """Name of the list of decoder layers in a model."""
    return _list_of(find_moe_layers(model)[0])


def _list_of(layer: MoELayer) -> str:
    name: str = DECODER_LAYER.split(layer.name)[0]
    return name


def experts_per_token(model: PreTrainedModel) -> int:
    """K, the number of experts that every token is routed to; the largest one if layers differ.

    Raises:
        ConfigError: no known field of the configuration gives it.
    """
    config = model.config.get_text_config()
    for name in TOP_K_FIELDS:
        value = getattr(config, name, None)
        if value is not None:
            return int(max(value)) if isinstance(value, list | tuple) else int(value)
    raise ConfigError(
        f"{type(model).__name__} needs a missing capability: its configuration gives the number of experts"
        f" per token under none of the known names {', '.join(TOP_K_FIELDS)}"
    )


class _FinalHiddenStates(MoeModelOutputWithPast):  # type: ignore[misc]
    """A body's output that has only the final hidden states; whatever else a family returns is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class _PassThrough(nn.Module):
    """A body that returns its input as the final hidden states."""

    def forward(self, inputs_embeds: Tensor, **_: object) -> MoeModelOutputWithPast:
        return _FinalHiddenStates(last_hidden_state=inputs_embeds)


def _without_body(model: PreTrainedModel) -> PreTrainedModel:
    """A model that shares all parameters and whose forward starts at the final hidden states."""
    head: PreTrainedModel = _with_child(model, _body_name(model), _PassThrough())
    return head


def _with_child(module: Any, name: str, child: nn.Module) -> Any:
    """A module that shares everything with another but the submodule of this name."""
    copied = copy.copy(module)
    # With a device map, accelerate sets a forward that is bound to the whole model.
    copied.__dict__.pop("forward", None)
    first, _, rest = name.partition(".")
    replacement = _with_child(module._modules[first], rest, child) if rest else child
    copied._modules = {**module._modules, first: replacement}
    return copied


def _body_name(model: PreTrainedModel) -> str:
    """Name of the submodule that computes the final hidden states; not base_model_prefix in every family.

    It is the child with the experts. If that has a head itself, as in some wrappers, it is inside of it.
    """
    children = [(name, child) for name, child in model.named_children() if isinstance(child, PreTrainedModel)]
    with_experts = [(name, child) for name, child in children if any(map(is_experts, child.modules()))]
    name, body = (with_experts or children)[0]
    has_head = body.get_output_embeddings() is not None
    return f"{name}.{_body_name(body)}" if has_head else name


def _layer_index(name: str) -> int:
    """Decoder layer index from a module name such as `model.layers.3.mlp.experts`."""
    match = DECODER_LAYER.search(name)
    assert match is not None, f"experts module outside a list of layers: {name}"
    return int(match.group(1))
