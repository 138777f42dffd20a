"""The uniform form: one width everywhere, in the family's own class and model type.

In: a ragged model whose experts all have one width. Out: the same model with dense experts, and a configuration that says so.
`uniform_settings` finds, on the meta device and before any expensive work, which fields of the configuration to change.
Shape letters: D model width, E experts, F atomic experts of an expert, G rows of the input projection.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from heapr.errors import ConfigError
from heapr.model.experts.layout import Experts, layout_of, matrices_of, model_width_of
from heapr.model.moe import MoEModel, find_moe_layers

Settings = Mapping[str, int]


def uniform_settings(config: PretrainedConfig, width: int) -> Settings:
    """The fields that give every routed expert a new width and change nothing else, with their values.

    Where shared experts take their width from the same field, their number is changed so that their width stays.

    Args:
        config: of a dense model.
        width: atomic experts of every expert.

    Raises:
        ConfigError: no such fields.
    """
    dense = _on_meta(config)
    old = next(iter(find_moe_layers(dense))).width
    wanted = {name: tuple(shape) for name, shape in _shapes(dense, width).items()}
    fields = {name: value for name, value in config.get_text_config().to_dict().items() if type(value) is int}
    widths_of_shared = set()
    for field in (name for name, value in fields.items() if value == old):
        changes = [{field: width}]
        for shared, number in ((name, value) for name, value in fields.items() if "shared" in name and 0 < value < old):
            widths_of_shared.add(number * old)
            changes += [{field: width, shared: number * old // width}] if number * old % width == 0 else []
        for change in changes:
            if width == old or {name: tuple(p.shape) for name, p in _on_meta(config, change).named_parameters()} == wanted:
                return change
    in_the_way = {shared for shared in widths_of_shared if shared % width}
    if in_the_way:
        reason = f"shared experts of width {min(in_the_way)} take it from the same field, and {width} does not divide it"
        divisors = [str(w) for w in range(1, old) if min(in_the_way) % w == 0]
        advice = f"choose a ratio that leaves a width of {', '.join(divisors[-4:])}, or pruning.form=ragged"
    else:
        reason, advice = "no field of it is the routed experts' width alone", "use pruning.form=ragged"
    raise ConfigError(
        f"pruning.form=uniform: the configuration of {type(dense).__name__} cannot give all routed experts a width of {width}: "
        f"{reason}; {advice}"
    )


@torch.no_grad()
def make_uniform(model: MoEModel, settings: Settings) -> None:
    """Turn ragged experts of one width into the family's own experts, layer after layer, in place."""
    config = model.model.config.get_text_config()
    template = _on_meta(model.model.config, settings)
    for field, value in settings.items():
        setattr(config, field, value)
    for layer in model.layers:
        dense: Experts = template.get_submodule(layer.name)
        _fill(dense, layer.experts)
        layer.replace_experts(dense)


def _fill(dense: Experts, ragged: Experts) -> None:
    """Give experts on the meta device the weights of ragged ones."""
    layout, matrices = layout_of(dense), list(matrices_of(ragged))
    tensors = {
        layout.input_name: torch.stack([m.inputs_GD for m in matrices]),
        "down_proj": torch.stack([m.down_DF for m in matrices]),
    }
    if layout.is_transposed:
        tensors = {name: tensor.transpose(1, 2).contiguous() for name, tensor in tensors.items()}
    if layout.has_bias:
        tensors[f"{layout.input_name}_bias"] = torch.stack([m.inputs_bias_G for m in matrices if m.inputs_bias_G is not None])
        tensors["down_proj_bias"] = ragged.down_proj_bias
    for name, parameter in dense.named_parameters():
        assert parameter.shape == tensors[name].shape, name
        setattr(dense, name, nn.Parameter(tensors[name]))


def _on_meta(config: PretrainedConfig, changes: Settings | None = None) -> PreTrainedModel:
    changed = copy.deepcopy(config)
    for field, value in (changes or {}).items():
        setattr(changed.get_text_config(), field, value)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(changed)
    return model


def _shapes(model: PreTrainedModel, width: int) -> dict[str, torch.Size]:
    """Shapes of all parameters once every routed expert has the new width."""
    experts = {layer.name: layer.experts for layer in find_moe_layers(model)}
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    for name, module in experts.items():
        shapes |= {f"{name}.{child}": shape for child, shape in _resized(module, width)}
    return shapes


def _resized(experts: Experts, width: int) -> Iterator[tuple[str, torch.Size]]:
    layout = layout_of(experts)
    num_experts, model_width = experts.num_experts, model_width_of(experts)
    num_inputs = width * (2 if layout.has_gate else 1)
    inputs, down = (num_inputs, model_width), (model_width, width)
    if layout.is_transposed:
        inputs, down = inputs[::-1], down[::-1]
    yield layout.input_name, torch.Size((num_experts, *inputs))
    yield "down_proj", torch.Size((num_experts, *down))
    if layout.has_bias:
        yield f"{layout.input_name}_bias", torch.Size((num_experts, num_inputs))
        yield "down_proj_bias", torch.Size((num_experts, model_width))
