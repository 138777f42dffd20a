"""How much is removed, counted in what, and which layers lose nothing; nothing about models.

In: an experiment's numbers, the widths of a model's experts, statistics for what atomic experts cost. Out:
how many atomic experts go, layer by layer.
Shape letters: E experts, K experts per token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from heapr.errors import ConfigError
from heapr.types import Granularity, Statistics

Widths = Mapping[int, Sequence[int]]  # atomic experts of every expert, by decoder layer index
Costs = Mapping[int, Tensor]  # of one atomic expert of each expert: float64 (E,), by decoder layer index


@dataclass(frozen=True)
class Budget:
    """How much is removed.

    Attributes:
        ratio: share of all routed atomic experts to remove, or of what they cost in `unit`, in [0, 1).
        scope: what is ranked together: "global" all layers (HEAPr-G of the paper), "layer" each layer by
            itself (HEAPr-L), "expert" each expert by itself. Layers ("layer", "expert") and experts
            ("expert") lose the same share t, to within half an atomic expert, with t such that the total is
            exact.
        experts_per_token: K. At least K experts of every layer keep at least one atomic expert.
        width_multiple: every expert's width becomes a multiple of it.
        uniform_width: the width that every expert gets (scope "expert"), chosen beforehand (`near_widths`).
            With None, experts have individual widths.
        granularity: what is removed as one piece. Whole experts (not with scope "expert") are removed as near
            to the ratio as they come; layers ("layer") then lose the same share to within half an expert, and
            K experts of every layer stay whole.
        unit: what the ratio is a share of: "atomic_experts", or the routed experts' "flops" (`costs_of`).
        protected_layers: decoder layer indices of which nothing is removed. The other layers lose
            correspondingly more.
    """

    ratio: float
    scope: str
    experts_per_token: int
    width_multiple: int = 1
    uniform_width: int | None = None
    granularity: Granularity = Granularity.ATOMIC_EXPERT
    unit: str = "atomic_experts"
    protected_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        assert 0 <= self.ratio < 1 and self.scope in {"global", "layer", "expert"}, (self.ratio, self.scope)
        assert self.uniform_width is None or (self.uniform_width > 0 and self.scope == "expert")
        assert self.granularity is Granularity.ATOMIC_EXPERT or self.scope != "expert"
        assert self.unit in {"atomic_experts", "flops"}, self.unit
        assert self.is_plain or self.scope != "expert"

    @property
    def is_plain(self) -> bool:
        """Whether atomic experts are counted and no layer is protected, as in the paper."""
        return self.unit == "atomic_experts" and not self.protected_layers

    def of_round(self, ratio: float, widths: Widths, original_widths: Widths, costs: Costs | None) -> Budget:
        """The budget for what an earlier round left, after which `ratio` of the original is gone."""
        width = self._uniform_width_of_round(ratio, original_widths)
        total = _size(original_widths, costs)
        left = _size(widths, costs)
        if left == total:
            return replace(self, ratio=ratio, uniform_width=width)
        kept = total - round_half_up(ratio * total) if costs is None else (1 - ratio) * total
        return replace(self, ratio=max(0.0, 1 - kept / left), uniform_width=width)

    def _uniform_width_of_round(self, ratio: float, original_widths: Widths) -> int | None:
        """On the way to the last round's width: the nearest to the ratio, and never below it."""
        if self.uniform_width is None or math.isclose(ratio, self.ratio):
            return self.uniform_width
        nearest = near_widths(the_width(original_widths), ratio, self.width_multiple)[0]
        return max(self.uniform_width, nearest)

    def check(self, widths: Widths) -> None:
        """Refuse whatever can be refused before there are scores.

        Raises:
            ConfigError: a layer would keep fewer experts than a token needs, the protected layers leave too
                little to remove or are not there, or widths are not multiples.
        """
        self._check_protected_layers(widths)
        if self.granularity is Granularity.EXPERT:
            self._check_whole_experts(widths)
        if self.unit == "atomic_experts":
            self.numbers_removed(widths)
        if self.uniform_width is None:
            self._check_multiples(widths)

    def numbers_removed(self, widths: Widths) -> list[int]:
        """How many atomic experts go: one number for all layers ("global"), else one per layer.

        Raises:
            ConfigError: the layers would keep fewer than must stay.
        """
        sizes = _layer_sizes(widths)
        number = round_half_up(self.ratio * sum(sizes.values()))
        removable = [sizes[index] - self._least_kept(index, width_E) for index, width_E in widths.items()]
        if self.scope == "global":
            numbers = [number]
            removable = [sum(removable)]
        else:
            free = [0 if index in self.protected_layers else size for index, size in sizes.items()]
            numbers = equal_shares(free, number)
        self._check_removable(numbers, removable)
        return numbers

    def _least_kept(self, index: int, width_E: Sequence[int]) -> int:
        """Atomic experts of a layer that stay: all of a protected layer, else one in each of K experts."""
        if index in self.protected_layers:
            return sum(width_E)
        num_present = sum(width > 0 for width in width_E)
        return min(self.experts_per_token, num_present)

    def _check_removable(self, numbers: Sequence[int], removable: Sequence[int]) -> None:
        for number, limit in zip(numbers, removable, strict=True):
            if number > limit:
                raise self.too_little_left()

    def _check_protected_layers(self, widths: Widths) -> None:
        layers = ", ".join(map(str, widths))
        unknown = set(self.protected_layers) - set(widths)
        if unknown:
            reason = f"layer {min(unknown)} is no MoE layer of this model"
            raise ConfigError(f"pruning.protected_layers: {reason}; choose of {layers}")
        if not set(widths) - set(self.protected_layers):
            reason = f"pruning.protected_layers protects every MoE layer ({layers})"
            raise ConfigError(f"{reason}, so nothing can be removed; name fewer")

    def _check_multiples(self, widths: Widths) -> None:
        others = {width for width_E in widths.values() for width in width_E if width % self.width_multiple}
        if others:
            divisor = math.gcd(self.width_multiple, *others)
            raise ConfigError(
                f"pruning.width_multiple={self.width_multiple}, but experts of this model have {min(others)} "
                f"atomic experts, which is no multiple of it; choose a divisor, for example {divisor}"
            )

    def _check_whole_experts(self, widths: Widths) -> None:
        """At the least, the K narrowest experts of each layer stay."""
        if not self.is_plain:
            raise ConfigError(
                "pruning.budget and pruning.protected_layers are for criteria that remove atomic experts, "
                "this one removes whole experts; choose another score or leave them at their defaults"
            )
        sizes = list(_layer_sizes(widths).values())
        narrowest = [sorted(filter(None, width_E)) for width_E in widths.values()]
        stay = [sum(width_E[: self.experts_per_token]) for width_E in narrowest]
        if self.scope == "global":
            sizes = [sum(sizes)]
            stay = [sum(stay)]
        numbers = [round_half_up(self.ratio * size) for size in sizes]
        removable = [size - least for size, least in zip(sizes, stay, strict=True)]
        self._check_removable(numbers, removable)

    def too_little_left(self) -> ConfigError:
        """The ratio is above what the protected layers and the experts per token leave."""
        asked = f"pruning.ratio={self.ratio} with scope '{self.scope}'"
        if self.is_plain:
            return ConfigError(
                f"{asked} would leave a layer fewer experts than the {self.experts_per_token} "
                "that every token is routed to; choose a lower ratio"
            )
        unit = self.unit.replace("_", " ")
        return ConfigError(
            f"{asked} is more of the {unit} than the protected layers and the {self.experts_per_token} "
            "experts of every token leave to remove; choose a lower ratio or protect fewer layers"
        )


def the_width(widths: Widths) -> int:
    """The one width of all experts.

    Raises:
        ConfigError: they have several.
    """
    present = {width for width_E in widths.values() for width in width_E}
    if len(present) != 1:
        reason = f"pruning.form=uniform needs experts of one width, this model has {len(present)}"
        raise ConfigError(f"{reason}; use pruning.form=ragged")
    return present.pop()


def near_widths(width: int, ratio: float, multiple: int) -> list[int]:
    """The widths less than one multiple from width * (1 - ratio), nearest first and the larger of two equally
    near ones.

    Candidates are the multiples from one multiple up, so never 0, and the width that there is.
    """
    exact = round(width * (1 - ratio), 9)  # 0.1 * 80 is 8.000000000000004 in some orders of the same sum
    candidates = {*range(multiple, width + 1, multiple), width}
    near = [each for each in candidates if abs(each - exact) < multiple]
    return sorted(near, key=lambda each: (abs(each - exact), -each))


def equal_shares(sizes: Sequence[int], number: int) -> list[int]:
    """How many items of each group are among the first `number` of all, if the j-th of a group of s comes at
    the share (j - 1/2) / s; of equal shares the first group's.

    So there is one share t of which every group gives t s, rounded to the nearest number, and no group gives
    fewer when `number` grows.
    """
    total = sum(sizes)
    margin = len(sizes) / 2 + 1  # at the share (number - margin) / total no more than `number` have come
    counts = [max(0, math.ceil(size * (number - margin) / total - 0.5)) for size in sizes]
    groups = [group for group, size in enumerate(sizes) if size]

    def share_of_next(group: int) -> float:
        return (counts[group] + 0.5) / sizes[group]

    while sum(counts) < number:
        counts[min(groups, key=share_of_next)] += 1
    return counts


def costs_of(unit: str, statistics: Statistics, parameters: Mapping[int, int]) -> Costs | None:
    """What an atomic expert costs, up to a common factor, because a budget is a share. None for
    "atomic_experts".

        "flops": n_e P_l

    with n_e the number of calibration tokens that the router sends to expert e and P_l the weights of one
    atomic expert of layer l: every visit multiplies and adds each once.

    Args:
        parameters: P_l, by decoder layer index.
    """
    if unit == "atomic_experts":
        return None
    counts = {index: layer.count_E.double().cpu() for index, layer in statistics.layers.items()}
    return {index: parameters[index] * count_E for index, count_E in counts.items()}


def cost_of_layer(cost_E: Tensor, width_E: Sequence[int]) -> float:
    """What all atomic experts of a layer cost."""
    return float((cost_E * torch.tensor(width_E)).sum())


def round_half_up(number: float) -> int:
    return math.floor(number + 0.5)


def _layer_sizes(widths: Widths) -> dict[int, int]:
    """Atomic experts of each layer."""
    return {index: sum(width_E) for index, width_E in widths.items()}


def _size(widths: Widths, costs: Costs | None) -> float:
    """All atomic experts, or what they cost."""
    if costs is None:
        return sum(_layer_sizes(widths).values())
    return sum(cost_of_layer(costs[index], width_E) for index, width_E in widths.items())
