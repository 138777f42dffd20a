"""The form with fewer experts: removed experts are gone from the router too, in the family's own class.

In: a ragged model that has lost whole experts, equally many in each layer. Out: the same model with fewer
experts, and a configuration that says so. A token is then routed to the best of the experts that are left, as
in REAP (Router-weighted Expert Activation Pruning, ICLR 2026), and its router weights are those of these.
Shape letters: E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from heapr.errors import ConfigError
from heapr.model.experts.layout import matrices_of
from heapr.model.moe import MoELayer, MoEModel, find_moe_layers
from heapr.pruning.budget import Widths
from heapr.pruning.meta_shapes import Shapes, integers_of, on_meta, shapes_of
from heapr.pruning.rounding import round_half_up
from heapr.pruning.uniform import Settings, fill_experts


def choose_num_experts(widths: Widths, ratio: float, experts_per_token: int) -> int:
    """How many experts every layer keeps: E less round(ratio E).

    Raises:
        ConfigError: layers have several numbers of experts, tokens need more, or none would go.
    """
    numbers = {len(width_E) for width_E in widths.values()}
    if len(numbers) > 1:
        found = ", ".join(map(str, sorted(numbers)))
        raise ConfigError(
            "pruning.form=fewer_experts needs the same number of experts in every layer, this model has "
            f"{found}; use pruning.form=ragged"
        )
    number = numbers.pop()
    removed = round_half_up(ratio * number)
    left = number - removed
    if left < experts_per_token or not removed:
        least = 1 / number
        most = 1 - experts_per_token / number
        raise ConfigError(
            f"pruning.form=fewer_experts: pruning.ratio={ratio:g} leaves {left} of {number} experts, and "
            f"every token is routed to {experts_per_token}; choose a ratio from {least:.4g} to {most:.4g}"
        )
    return left


def describe_num_experts(widths: Widths, ratio: float, left: int) -> str:
    """One line that compares the requested number of experts with the chosen one."""
    first_layer = next(iter(widths.values()))
    number = len(first_layer)
    exact = number * (1 - ratio)
    reached = 1 - left / number
    asked = f"fewer experts: ratio {ratio:.6g} asks for {exact:.6g} of {number} in every layer"
    return f"{asked}; {left} are kept, which is ratio {reached:.6g}"


def fewer_experts_settings(config: PretrainedConfig, number: int) -> Settings:
    """Return the field and value that give every MoE layer another number of experts and change nothing else.

    Raises:
        ConfigError: no such field exists.
    """
    dense = on_meta(config)
    layers = find_moe_layers(dense)
    old = layers[0].num_experts
    before = shapes_of(dense)
    for field, value in integers_of(config).items():
        settings = {field: number}
        if value == old and _has_fewer(before, config, settings, layers):
            return settings
    raise ConfigError(
        f"pruning.form=fewer_experts: no field of the configuration of {type(dense).__name__} is the number "
        f"of experts alone, or it cannot be {number}; use pruning.form=ragged"
    )


def _has_fewer(before: Shapes, config: PretrainedConfig, settings: Settings, layers: list[MoELayer]) -> bool:
    """Whether settings shorten the experts and what is as long in their blocks, and nothing else."""
    try:
        after = shapes_of(on_meta(config, settings))
    except (ValueError, RuntimeError):
        # A number that the family does not take.
        return False
    if before.keys() != after.keys():
        return False
    (number,) = settings.values()
    in_blocks = tuple(f"{_block_name(layer)}." for layer in layers)
    in_experts = tuple(f"{layer.name}." for layer in layers)
    for name, shape in after.items():
        shorter = (number, *before[name][1:])
        may_be_shorter = name.startswith(in_blocks) and shape == shorter
        if shape != before[name] and not may_be_shorter:
            return False
        if name.startswith(in_experts) and shape[0] != number:
            return False
    return True


@torch.no_grad()
def make_fewer_experts(model: MoEModel, settings: Settings) -> None:
    """Leave experts of width 0 out of a ragged model, and what the router has for them, in place.

    Args:
        model: ragged; in every layer as many experts have their full width as the settings say.
        settings: from `fewer_experts_settings`.
    """
    template = on_meta(model.model.config, settings)
    config = model.model.config.get_text_config()
    for field, value in settings.items():
        setattr(config, field, value)
    for layer in model.layers:
        block_name, _, child = layer.name.rpartition(".")
        block = template.get_submodule(block_name)
        width_E = torch.tensor(layer.widths)
        kept = width_E.nonzero().flatten()
        matrices = [each for each in matrices_of(layer.experts) if each.down_DF.shape[1]]
        experts = block.get_submodule(child)
        fill_experts(experts, matrices)
        _fill_rest(block, layer.block, kept, child)
        model.model.set_submodule(block_name, block)
    model.layers = find_moe_layers(model.model)


def _fill_rest(block: nn.Module, old: nn.Module, kept: Tensor, experts: str) -> None:
    """Give a block on the meta device the old one's tensors, of the kept experts where they are shorter."""
    for name, module in block.named_modules():
        first_name, _, _ = name.partition(".")
        if first_name == experts:
            continue
        before = old.get_submodule(name)
        for child, parameter in module.named_parameters(recurse=False):
            old_parameter = getattr(before, child)
            tensor = _rows(old_parameter, parameter.shape, kept)
            new_parameter = nn.Parameter(tensor, requires_grad=old_parameter.requires_grad)
            setattr(module, child, new_parameter)
        for child, buffer in module.named_buffers(recurse=False):
            tensor = _rows(getattr(before, child), buffer.shape, kept)
            setattr(module, child, tensor)
        module.train(before.training)


def _rows(tensor: Tensor, shape: torch.Size, kept: Tensor) -> Tensor:
    """The tensor if it has the shape, else a copy of its rows of the kept experts."""
    if tensor.shape == shape:
        return tensor
    kept_rows = tensor[kept.to(tensor.device)]
    return kept_rows.clone()


def _block_name(layer: MoELayer) -> str:
    """Name of the module that owns a layer's experts."""
    block_name, _, _ = layer.name.rpartition(".")
    return block_name
