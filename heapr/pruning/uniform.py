"""The uniform form: all experts have one width, in the family's own class and model type.

In: a ragged model whose experts all have one width. Out: the same model with dense experts, and a
configuration that says so. `choose_uniform_width` and `uniform_settings` find the width and the fields of the
configuration to change. They work on the meta device and run before any expensive work.
Shape letters: D model width, E experts, F atomic experts of an expert, G rows of the input projection.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import nn
from transformers import PretrainedConfig

from heapr.errors import ConfigError
from heapr.model.experts.layout import Experts, Matrices, layout_of, matrices_of
from heapr.model.moe import MoELayer, MoEModel, find_moe_layers
from heapr.pruning.budget import Budget, Widths, the_width
from heapr.pruning.meta_shapes import integers_of, on_meta, resized_shapes, shapes_of
from heapr.pruning.rounding import near_widths

Settings = Mapping[str, int]

# grouped_mm needs rows of the down projection that are a multiple of so many bytes.
KERNEL_BYTES = 16
NUM_TRIED = 3  # widths that are tried for a piece of advice


def choose_uniform_width(config: PretrainedConfig, widths: Widths, budget: Budget, dtype: torch.dtype) -> int:
    """Return the width that every expert gets.

    This is the multiple of `width_multiple` nearest to F (1 - ratio). If the configuration cannot express it,
    it is the multiple on the other side of F (1 - ratio).

    Args:
        config: of a dense model.
        widths: of its experts.
        budget: only the ratio and the multiple matter.
        dtype: of the weights.

    Raises:
        ConfigError: the experts have several widths; the configuration can express neither width; no
            candidate is below the present width; or transformers' default experts kernel (grouped_mm), which
            needs rows of a multiple of 16 bytes, cannot run the width.
    """
    old = the_width(widths)
    near = near_widths(old, budget.ratio, budget.width_multiple)
    configuration = _Configuration(config)
    expressible = filter(configuration.can_express, near)
    width = next(expressible, old)
    if width != old or budget.ratio == 0:
        _check_kernel(width, old, budget, dtype)
        return width
    if near[0] != old:
        raise configuration.not_expressible(near[0], budget.width_multiple, dtype.itemsize)
    raise _nothing_removed(configuration, budget, dtype.itemsize)


def _check_kernel(width: int, old: int, budget: Budget, dtype: torch.dtype) -> None:
    """Refuse a new width that transformers' default experts kernel cannot run.

    Raises:
        ConfigError: naming the size of its rows.
    """
    if width == old or _runs(width, dtype.itemsize):
        return
    name = str(dtype).removeprefix("torch.")
    row = width * dtype.itemsize
    raise ConfigError(
        f"{_asked(old, budget)}, with pruning.width_multiple={budget.width_multiple} {width}, which "
        f"transformers' default experts kernel (grouped_mm) does not run in {name}: rows of {row} bytes "
        f"are not a multiple of {KERNEL_BYTES}; leave width_multiple out for multiples of 8, "
        "or choose pruning.form=ragged"
    )


def _runs(width: int, itemsize: int) -> bool:
    """Whether transformers' default experts kernel runs a width."""
    return width * itemsize % KERNEL_BYTES == 0


def _nothing_removed(configuration: _Configuration, budget: Budget, itemsize: int) -> ConfigError:
    """The error for a nearest width that is the present one. It lists options that would remove something."""
    old = configuration.width
    advice = configuration.ratios_that_work(old, budget.width_multiple, itemsize)
    exact = near_widths(old, budget.ratio, 1)[0]
    if exact != old and _runs(exact, itemsize) and configuration.can_express(exact):
        advice.append(f"pruning.width_multiple=1 (width {exact})")
    advice.append("pruning.form=ragged")
    options = " or ".join(advice)
    reason = f"the nearest multiple of {budget.width_multiple} removes nothing"
    return ConfigError(f"{_asked(old, budget)}, and {reason}; choose {options}")


def _asked(old: int, budget: Budget) -> str:
    """The beginning of messages: which width the ratio asks for."""
    exact = old * (1 - budget.ratio)
    return f"pruning.form=uniform: pruning.ratio={budget.ratio:g} asks for a width of {exact:.6g} of {old}"


def describe_uniform_width(widths: Widths, ratio: float, width: int) -> str:
    """One line that compares the requested width with the chosen one."""
    old = the_width(widths)
    exact = old * (1 - ratio)
    reached = 1 - width / old
    asked = f"uniform width: ratio {ratio:.6g} asks for {exact:.6g} of {old} atomic experts"
    taken = f"{width} are kept, which is ratio {reached:.6g}"
    runs_in_every_dtype = width % 8 == 0
    if runs_in_every_dtype or width == old:
        return f"{asked}; {taken}"
    return f"{asked}; {taken}; transformers' default experts kernel (grouped_mm) runs it in float32 alone"


def uniform_settings(config: PretrainedConfig, width: int) -> Settings:
    """Return fields and values that give every routed expert a new width and change nothing else.

    If shared experts take their width from the same field, their number changes such that their total width
    stays the same.

    Args:
        config: of a dense model.
        width: atomic experts of every expert.

    Raises:
        ConfigError: no such fields exist.
    """
    configuration = _Configuration(config)
    settings = configuration.settings(width)
    if settings is None:
        raise configuration.not_expressible(width, 1, KERNEL_BYTES)
    return settings


class _Configuration:
    """A dense model's configuration, and the widths that it can express.

    Attributes:
        config: the configuration.
        model: its model on the meta device.
        width: atomic experts of an expert of the first MoE layer.
        fields: the configuration's integers.
        shared: the fields that may be the number of shared experts.
    """

    def __init__(self, config: PretrainedConfig) -> None:
        self.config = config
        self.model = on_meta(config)
        first_layer = next(iter(find_moe_layers(self.model)))
        self.width = first_layer.width
        self.shared: dict[str, int] = {}
        self.fields = integers_of(config)
        for name, value in self.fields.items():
            if "shared" in name and 0 < value < self.width:
                self.shared[name] = value

    def can_express(self, width: int) -> bool:
        """Whether it can give every routed expert a width and change nothing else."""
        return self.settings(width) is not None

    def settings(self, width: int) -> Settings | None:
        """See `uniform_settings`; None if no such fields exist.

        Candidates are tried on the meta device, where the shapes of all parameters are compared.
        """
        wanted = resized_shapes(self.model, width)
        for field, value in self.fields.items():
            if value != self.width:
                continue
            for change in self._changes(field, width):
                if width == self.width:
                    return change
                changed = on_meta(self.config, change)
                if shapes_of(changed) == wanted:
                    return change
        return None

    def _changes(self, field: str, width: int) -> list[Settings]:
        """The field's new value, alone or with a number of shared experts that keeps their total width."""
        changes: list[Settings] = [{field: width}]
        for name, number in self.shared.items():
            shared_width = number * self.width
            if shared_width % width == 0:
                changes.append({field: width, name: shared_width // width})
        return changes

    def not_expressible(self, width: int, multiple: int, itemsize: int) -> ConfigError:
        """The error for a width that the configuration cannot give all routed experts, with what it can."""
        reason = "no field of it is the routed experts' width alone"
        advice = "use pruning.form=ragged"
        in_the_way = [shared for shared in self._shared_widths() if shared % width]
        if in_the_way and self.width in self.fields.values():
            shared = min(in_the_way)
            reason = f"shared experts of width {shared} have the same field, and {width} does not divide it"
            possible = " or ".join(self.ratios_that_work(width, multiple, itemsize))
            if possible:
                advice = f"choose {possible}, or pruning.form=ragged"
        name = type(self.model).__name__
        subject = f"the configuration of {name} cannot give all routed experts a width of {width}"
        return ConfigError(f"pruning.form=uniform: {subject}: {reason}; {advice}")

    def ratios_that_work(self, width: int, multiple: int, itemsize: int) -> list[str]:
        """Ratios whose widths are near the given one, that the kernel runs, and that were tried."""

        def distance(other: int) -> int:
            return abs(other - width)

        candidates = range(multiple, self.width, multiple)
        runnable = [other for other in candidates if _runs(other, itemsize)]
        nearest = sorted(runnable, key=distance)
        divisors = [other for other in nearest if self._divides_a_shared_width(other)]
        tried = {*divisors[:NUM_TRIED], *nearest[:NUM_TRIED]}
        ratios = []
        for other in filter(self.can_express, sorted(tried, reverse=True)):
            ratio = 1 - other / self.width
            ratios.append(f"pruning.ratio={ratio:.6g} (width {other})")
        return ratios

    def _shared_widths(self) -> list[int]:
        """Total width of the shared experts, for each field that may be their number."""
        return [number * self.width for number in self.shared.values()]

    def _divides_a_shared_width(self, width: int) -> bool:
        """Whether shared experts could be a whole number of experts of this width."""
        return any(shared % width == 0 for shared in self._shared_widths())


@torch.no_grad()
def make_uniform(model: MoEModel, settings: Settings) -> None:
    """Turn ragged experts of one width into the family's own experts, layer by layer, in place.

    Args:
        model: ragged.
        settings: from `uniform_settings`.
    """
    config = model.model.config.get_text_config()
    template = on_meta(model.model.config, settings)
    for field, value in settings.items():
        setattr(config, field, value)
    for layer in model.layers:
        dense = template.get_submodule(layer.name)
        model.change(layer, partial(_become, layer, dense))


def _become(layer: MoELayer, dense: Experts) -> None:
    """Replace a layer's experts by dense ones on the meta device, with their weights."""
    matrices = list(matrices_of(layer.experts))
    fill_experts(dense, matrices)
    layer.replace_experts(dense)


def fill_experts(dense: Experts, matrices: Sequence[Matrices]) -> None:
    """Give experts on the meta device weights, expert by expert."""
    layout = layout_of(dense)
    inputs, inputs_biases, down, down_biases = zip(*matrices, strict=True)
    inputs_EGD = torch.stack(inputs)
    down_EDF = torch.stack(down)
    if layout.is_transposed:
        inputs_EGD = inputs_EGD.transpose(1, 2).contiguous()
        down_EDF = down_EDF.transpose(1, 2).contiguous()
    tensors = {layout.input_name: inputs_EGD, "down_proj": down_EDF}
    if layout.has_bias:
        tensors[f"{layout.input_name}_bias"] = torch.stack(inputs_biases)
        tensors["down_proj_bias"] = torch.stack(down_biases)
    for name, parameter in dense.named_parameters():
        tensor = tensors[name]
        assert parameter.shape == tensor.shape, name
        setattr(dense, name, nn.Parameter(tensor))
