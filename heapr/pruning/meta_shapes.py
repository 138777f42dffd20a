"""The shapes of a family's parameters under a configuration, on the meta device.

In: a configuration and changes of its fields. Out: a model without memory, and the shapes of its parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping

import torch
from transformers import PretrainedConfig, PreTrainedModel

from heapr.model.auto_class import auto_class
from heapr.model.experts.layout import Experts, layout_of, model_width_of
from heapr.model.moe import find_moe_layers

Shapes = dict[str, tuple[int, ...]]


def integers_of(config: PretrainedConfig) -> dict[str, int]:
    """The fields of the configuration's text part that are integers."""
    fields = config.get_text_config().to_dict()
    return {name: value for name, value in fields.items() if type(value) is int}


def on_meta(config: PretrainedConfig, changes: Mapping[str, int] | None = None) -> PreTrainedModel:
    """The configuration's model on the meta device, with some fields of its text part changed."""
    changed = copy.deepcopy(config)
    text_config = changed.get_text_config()
    for field, value in (changes or {}).items():
        setattr(text_config, field, value)
    with torch.device("meta"):
        model: PreTrainedModel = auto_class(config).from_config(changed)
    return model


def shapes_of(model: PreTrainedModel) -> Shapes:
    """Shapes of all parameters."""
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def resized_shapes(model: PreTrainedModel, width: int) -> Shapes:
    """Shapes of all parameters if every routed expert had another width."""
    shapes = shapes_of(model)
    for layer in find_moe_layers(model):
        resized = _resized(layer.experts, width)
        for child, shape in resized:
            name = f"{layer.name}.{child}"
            shapes[name] = shape
    return shapes


def _resized(experts: Experts, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the experts' parameters if they had another width."""
    layout = layout_of(experts)
    num_experts = experts.num_experts
    model_width = model_width_of(experts)
    num_inputs = 2 * width if layout.has_gate else width
    if layout.is_transposed:
        yield layout.input_name, (num_experts, model_width, num_inputs)
        yield "down_proj", (num_experts, width, model_width)
    else:
        yield layout.input_name, (num_experts, num_inputs, model_width)
        yield "down_proj", (num_experts, model_width, width)
    if layout.has_bias:
        yield f"{layout.input_name}_bias", (num_experts, num_inputs)
        yield "down_proj_bias", (num_experts, model_width)
