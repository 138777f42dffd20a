"""The uniform form: one width everywhere, in the family's own class and model type.

In: a ragged model whose experts all have one width. Out: the same model with dense experts, and a
configuration that says so. `choose_uniform_width` and `uniform_settings` find, on the meta device and before
any expensive work, which width and which fields of the configuration to change.
Shape letters: D model width, E experts, F atomic experts of an expert, G rows of the input projection.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from heapr.errors import ConfigError
from heapr.model.experts.layout import Experts, layout_of, matrices_of, model_width_of
from heapr.model.moe import MoELayer, MoEModel, find_moe_layers
from heapr.pruning.budget import Budget, Widths, near_widths, the_width

Settings = Mapping[str, int]

KERNEL_BYTES = 16  # of which grouped_mm wants every row of the down projection to be a multiple
NUM_TRIED = 3  # widths for an advice


def choose_uniform_width(config: PretrainedConfig, widths: Widths, budget: Budget, dtype: torch.dtype) -> int:
    """The width that every expert gets: the multiple of `width_multiple` nearest to what the ratio asks for
    or, if the configuration cannot say that one, the next on the other side.

    Args:
        config: of a dense model.
        widths: of its experts.
        budget: of which the ratio and the multiple matter.
        dtype: of the weights.

    Raises:
        ConfigError: the experts have several widths, no such width can be said, none is below the present
            one, or transformers' default experts kernel (grouped_mm) does not run it: it needs rows of a
            multiple of 16 bytes.
    """
    old = the_width(widths)
    near = near_widths(old, budget.ratio, budget.width_multiple)
    width = next((each for each in near if _find_settings(config, each) is not None), old)
    if width != old or budget.ratio == 0:
        _check_kernel(width, old, budget, dtype)
        return width
    if near[0] != old:
        raise _not_expressible(config, near[0], budget.width_multiple, dtype.itemsize)
    raise _nothing_removed(config, old, budget, dtype.itemsize)


def _check_kernel(width: int, old: int, budget: Budget, dtype: torch.dtype) -> None:
    """Refuse a width that transformers' default experts kernel does not run, unless it is the present one.

    Raises:
        ConfigError: naming the size of its rows.
    """
    row = width * dtype.itemsize
    if width != old and row % KERNEL_BYTES:
        name = str(dtype).removeprefix("torch.")
        raise ConfigError(
            f"{_asked(old, budget)}, with pruning.width_multiple={budget.width_multiple} {width}, which "
            f"transformers' default experts kernel (grouped_mm) does not run in {name}: rows of {row} bytes "
            f"are no multiple of {KERNEL_BYTES}; leave width_multiple out, which takes multiples of 8, "
            "or choose pruning.form=ragged"
        )


def _nothing_removed(config: PretrainedConfig, old: int, budget: Budget, itemsize: int) -> ConfigError:
    """The nearest width is the present one; the message names ratios and a multiple that would remove
    something."""
    advice = _ratios_that_work(config, old, budget.width_multiple, itemsize)
    exact = near_widths(old, budget.ratio, 1)[0]
    runs = exact * itemsize % KERNEL_BYTES == 0
    if exact != old and runs and _find_settings(config, exact) is not None:
        advice.append(f"pruning.width_multiple=1 (width {exact})")
    advice.append("pruning.form=ragged")
    reason = f"the nearest multiple of {budget.width_multiple} leaves all as it is"
    return ConfigError(f"{_asked(old, budget)}, and {reason}; choose {' or '.join(advice)}")


def _asked(old: int, budget: Budget) -> str:
    exact = old * (1 - budget.ratio)
    return f"pruning.form=uniform: pruning.ratio={budget.ratio:g} asks for a width of {exact:.6g} of {old}"


def describe_uniform_width(widths: Widths, ratio: float, width: int) -> str:
    """What was asked for and what is taken, in one line."""
    old = the_width(widths)
    asked = f"uniform width: ratio {ratio:.6g} asks for {old * (1 - ratio):.6g} of {old} atomic experts"
    taken = f"{width} are kept, which is ratio {1 - width / old:.6g}"
    if width % 8 == 0 or width == old:
        return f"{asked}; {taken}"
    return f"{asked}; {taken}; transformers' default experts kernel (grouped_mm) runs it in float32 alone"


def uniform_settings(config: PretrainedConfig, width: int) -> Settings:
    """The fields that give every routed expert a new width and change nothing else, with their values.

    If shared experts take their width from the same field, their number is changed so that their width stays.

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
    """The same, or None. Changes are tried on the meta device and the shapes of all parameters compared."""
    dense = _on_meta(config)
    old = _width_of(dense)
    wanted = _shapes(dense, width)
    fields = _integers(config)
    for field, value in fields.items():
        if value != old:
            continue
        for change in _changes(field, width, old, _shared_experts(fields, old)):
            if width == old or _shapes(_on_meta(config, change)) == wanted:
                return change
    return None


def _changes(field: str, width: int, old: int, shared: Mapping[str, int]) -> list[Settings]:
    """A new value of the field alone, or with a number of shared experts that leaves their width as it is."""
    changes: list[Settings] = [{field: width}]
    for name, number in shared.items():
        if number * old % width == 0:
            changes.append({field: width, name: number * old // width})
    return changes


def _integers(config: PretrainedConfig) -> dict[str, int]:
    fields = config.get_text_config().to_dict()
    return {name: value for name, value in fields.items() if type(value) is int}


def _shared_experts(fields: Mapping[str, int], old: int) -> dict[str, int]:
    """Fields that may be the number of shared experts."""
    return {name: value for name, value in fields.items() if "shared" in name and 0 < value < old}


def _not_expressible(config: PretrainedConfig, width: int, multiple: int, itemsize: int) -> ConfigError:
    """Why a configuration cannot give all routed experts a width, and what it can."""
    dense = _on_meta(config)
    old = _width_of(dense)
    fields = _integers(config)
    shared_widths = [number * old for number in _shared_experts(fields, old).values()]
    in_the_way = [shared for shared in shared_widths if shared % width]
    reason = "no field of it is the routed experts' width alone"
    advice = "use pruning.form=ragged"
    if in_the_way and old in fields.values():
        shared = min(in_the_way)
        reason = f"shared experts of width {shared} have the same field, and {width} does not divide it"
        possible = _ratios_that_work(config, width, multiple, itemsize)
        if possible:
            advice = f"choose {' or '.join(possible)}, or pruning.form=ragged"
    subject = f"the configuration of {type(dense).__name__} cannot give all routed experts a width of {width}"
    return ConfigError(f"pruning.form=uniform: {subject}: {reason}; {advice}")


def _ratios_that_work(config: PretrainedConfig, width: int, multiple: int, itemsize: int) -> list[str]:
    """Ratios that come to a width near another one and that the kernel runs. Each was tried, so the advice is
    true."""
    old = _width_of(_on_meta(config))
    fields = _integers(config)
    shared_widths = [number * old for number in _shared_experts(fields, old).values()]
    runnable = [other for other in range(multiple, old, multiple) if other * itemsize % KERNEL_BYTES == 0]
    nearest = sorted(runnable, key=lambda other: abs(other - width))

    def divides_a_shared_width(other: int) -> bool:
        return any(shared % other == 0 for shared in shared_widths)

    divisors = list(filter(divides_a_shared_width, nearest))
    tried = sorted({*divisors[:NUM_TRIED], *nearest[:NUM_TRIED]}, reverse=True)
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
        model.change(layer, partial(_become, layer, template.get_submodule(layer.name)))


def _become(layer: MoELayer, dense: Experts) -> None:
    _fill(dense, layer.experts)
    layer.replace_experts(dense)


def _fill(dense: Experts, ragged: Experts) -> None:
    """Give experts on the meta device the weights of ragged ones."""
    layout = layout_of(dense)
    matrices = list(matrices_of(ragged))
    inputs_EGD = torch.stack([each.inputs_GD for each in matrices])
    down_EDF = torch.stack([each.down_DF for each in matrices])
    if layout.is_transposed:
        inputs_EGD = inputs_EGD.transpose(1, 2).contiguous()
        down_EDF = down_EDF.transpose(1, 2).contiguous()
    tensors = {layout.input_name: inputs_EGD, "down_proj": down_EDF}
    if layout.has_bias:
        biases = [each.inputs_bias_G for each in matrices if each.inputs_bias_G is not None]
        tensors[f"{layout.input_name}_bias"] = torch.stack(biases)
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


def _width_of(model: PreTrainedModel) -> int:
    """Atomic experts of an expert of the first MoE layer."""
    return next(iter(find_moe_layers(model))).width


def _shapes(model: PreTrainedModel, width: int | None = None) -> dict[str, torch.Size]:
    """Shapes of all parameters: as they are, or once every routed expert has a new width."""
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    if width is None:
        return shapes
    for layer in find_moe_layers(model):
        for child, shape in _resized(layer.experts, width):
            shapes[f"{layer.name}.{child}"] = shape
    return shapes


def _resized(experts: Experts, width: int) -> Iterator[tuple[str, torch.Size]]:
    """Names and shapes of the experts' parameters once they have a new width."""
    layout = layout_of(experts)
    num_experts = experts.num_experts
    model_width = model_width_of(experts)
    num_inputs = width * (2 if layout.has_gate else 1)
    inputs = (num_inputs, model_width)
    down = (model_width, width)
    if layout.is_transposed:
        inputs = inputs[::-1]
        down = down[::-1]
    yield layout.input_name, torch.Size((num_experts, *inputs))
    yield "down_proj", torch.Size((num_experts, *down))
    if layout.has_bias:
        yield f"{layout.input_name}_bias", torch.Size((num_experts, num_inputs))
        yield "down_proj_bias", torch.Size((num_experts, model_width))
