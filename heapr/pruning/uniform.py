"""The uniform form: one width everywhere, in the family's own class and model type.

In: a ragged model whose experts all have one width. Out: the same model with dense experts, and a configuration that says so.
`choose_uniform_width` and `uniform_settings` find, on the meta device and before any expensive work, which width and which fields of
the configuration to change.
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
from heapr.pruning.budget import Budget, Widths, near_widths, the_width

Settings = Mapping[str, int]

KERNEL_BYTES = 16  # of which grouped_mm wants every row of the down projection to be a multiple
NUM_TRIED = 3  # widths for an advice


def choose_uniform_width(config: PretrainedConfig, widths: Widths, budget: Budget, dtype: torch.dtype) -> int:
    """The width that every expert gets: the multiple of `width_multiple` nearest to what the ratio asks for, or, if the configuration
    cannot say that one, the next on the other side.

    Args:
        config: of a dense model.
        widths: of its experts.
        budget: of which the ratio and the multiple matter.
        dtype: of the weights.

    Raises:
        ConfigError: the experts have several widths, no such width can be said, none is below what there is, or transformers' default
            experts kernel (grouped_mm) does not run it: it needs rows of a multiple of 16 bytes.
    """
    old = the_width(widths)
    near = near_widths(old, budget.ratio, budget.width_multiple)
    width = next((each for each in near if _find_settings(config, each) is not None), old)
    if width != old or budget.ratio == 0:
        _check_kernel(width, old, budget, dtype)
        return width
    if near[0] != old:
        raise _not_expressible(config, near[0], budget.width_multiple, dtype.itemsize)
    advice = _ratios_that_work(config, old, budget.width_multiple, dtype.itemsize)
    exact = near_widths(old, budget.ratio, 1)[0]
    if exact != old and exact * dtype.itemsize % KERNEL_BYTES == 0 and _find_settings(config, exact) is not None:
        advice.append(f"pruning.width_multiple=1 (width {exact})")
    raise ConfigError(
        f"{_asked(old, budget)}, and the nearest multiple of {budget.width_multiple} leaves all as it is; choose "
        f"{' or '.join([*advice, 'pruning.form=ragged'])}"
    )


def _check_kernel(width: int, old: int, budget: Budget, dtype: torch.dtype) -> None:
    """Whether transformers' default experts kernel runs a width; the one that there is was not our choice.

    Raises:
        ConfigError: it does not.
    """
    row = width * dtype.itemsize
    if width != old and row % KERNEL_BYTES:
        raise ConfigError(
            f"{_asked(old, budget)}, with pruning.width_multiple={budget.width_multiple} {width}, which transformers' default experts "
            f"kernel (grouped_mm) does not run in {str(dtype).removeprefix('torch.')}: rows of {row} bytes are no multiple of "
            f"{KERNEL_BYTES}; leave width_multiple out, which takes multiples of 8, or choose pruning.form=ragged"
        )


def _asked(old: int, budget: Budget) -> str:
    return f"pruning.form=uniform: pruning.ratio={budget.ratio:g} asks for a width of {old * (1 - budget.ratio):.6g} of {old}"


def describe_uniform_width(widths: Widths, ratio: float, width: int) -> str:
    """What was asked for and what is taken, in one line."""
    old = the_width(widths)
    asked = f"uniform width: ratio {ratio:.6g} asks for {old * (1 - ratio):.6g} of {old} atomic experts"
    alone = "" if width % 8 == 0 or width == old else "; transformers' default experts kernel (grouped_mm) runs it in float32 alone"
    return f"{asked}; {width} are kept, which is ratio {1 - width / old:.6g}{alone}"


def uniform_settings(config: PretrainedConfig, width: int) -> Settings:
    """The fields that give every routed expert a new width and change nothing else, with their values.

    Where shared experts take their width from the same field, their number is changed so that their width stays.

    Args:
        config: of a dense model.
        width: atomic experts of every expert.

    Raises:
        ConfigError: no such fields.
    """
    settings = _find_settings(config, width)
    if settings is None:
        raise _not_expressible(config, width, 1, KERNEL_BYTES)
    return settings


def _find_settings(config: PretrainedConfig, width: int) -> Settings | None:
    dense = _on_meta(config)
    old = next(iter(find_moe_layers(dense))).width
    wanted = {name: tuple(shape) for name, shape in _shapes(dense, width).items()}
    fields = _integers(config)
    for field in (name for name, value in fields.items() if value == old):
        changes = [{field: width}]
        for shared, number in _shared_experts(fields, old).items():
            changes += [{field: width, shared: number * old // width}] if number * old % width == 0 else []
        for change in changes:
            if width == old or {name: tuple(p.shape) for name, p in _on_meta(config, change).named_parameters()} == wanted:
                return change
    return None


def _integers(config: PretrainedConfig) -> dict[str, int]:
    return {name: value for name, value in config.get_text_config().to_dict().items() if type(value) is int}


def _shared_experts(fields: Mapping[str, int], old: int) -> dict[str, int]:
    """Fields that may be the number of shared experts."""
    return {name: value for name, value in fields.items() if "shared" in name and 0 < value < old}


def _not_expressible(config: PretrainedConfig, width: int, multiple: int, itemsize: int) -> ConfigError:
    """Why a configuration cannot give all routed experts a width, and what it can."""
    dense = _on_meta(config)
    old, fields = next(iter(find_moe_layers(dense))).width, _integers(config)
    in_the_way = [number * old for number in _shared_experts(fields, old).values() if number * old % width]
    reason, advice = "no field of it is the routed experts' width alone", ["use pruning.form=ragged"]
    if in_the_way and old in fields.values():
        reason = f"shared experts of width {min(in_the_way)} take it from the same field, and {width} does not divide it"
        possible = _ratios_that_work(config, width, multiple, itemsize)
        advice = ["choose " + " or ".join(possible), "or pruning.form=ragged"] if possible else advice
    return ConfigError(
        f"pruning.form=uniform: the configuration of {type(dense).__name__} cannot give all routed experts a width of {width}: "
        f"{reason}; {', '.join(advice)}"
    )


def _ratios_that_work(config: PretrainedConfig, width: int, multiple: int, itemsize: int) -> list[str]:
    """Ratios that come to a width near another one, and that the kernel runs; each was tried, so that the advice is true."""
    old, fields = next(iter(find_moe_layers(_on_meta(config)))).width, _integers(config)
    shared = [number * old for number in _shared_experts(fields, old).values()]
    runnable = [other for other in range(multiple, old, multiple) if other * itemsize % KERNEL_BYTES == 0]
    lower = sorted(runnable, key=lambda other: abs(other - width))
    divisors = [other for other in lower if any(each % other == 0 for each in shared)]
    tried = sorted({*divisors[:NUM_TRIED], *lower[:NUM_TRIED]}, reverse=True)
    possible = [other for other in tried if _find_settings(config, other) is not None]
    return [f"pruning.ratio={1 - other / old:.6g} (width {other})" for other in possible]


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
