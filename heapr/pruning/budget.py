"""How much is removed, counted in what, and what stays whatever it scores; nothing about models.

In: an experiment's numbers, the widths of a model's experts, statistics for what atomic experts cost. Out: how many atomic
experts go and stay, layer by layer and expert by expert.
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
Costs = Mapping[int, Tensor]  # of one atomic expert of every expert, float64 (E,), by decoder layer index; in any unit

ROUNDING_ERROR = 1e-9  # 0.07 * 100 is 7.000000000000001, and its ceiling 7


@dataclass(frozen=True)
class Guards:
    """What stays whatever it scores, and how far layers are made comparable. The defaults guard nothing.

    Attributes:
        min_expert_ratio: share of every expert's atomic experts that stays, its best; rounded up, in [0, 1).
        min_layer_ratio: the same of every layer.
        protected_layers: decoder layer indices of which nothing is removed.
        tempering: t in [0, 1]; the scores of layer l are multiplied by (m / m_l)^t, with m_l their mean and m the mean of all m_l
            (`heapr.pruning.allocation.temper`). 0 leaves them as they are, 1 gives every layer the same mean.
        original_widths: what the floors are shares of; none takes the widths that are allocated. Whoever prunes what is pruned
            already gives the widths that it had at first.
    """

    min_expert_ratio: float = 0.0
    min_layer_ratio: float = 0.0
    protected_layers: tuple[int, ...] = ()
    tempering: float = 0.0
    original_widths: Widths | None = None

    def __post_init__(self) -> None:
        assert 0 <= self.min_expert_ratio < 1 and 0 <= self.min_layer_ratio < 1 and 0 <= self.tempering <= 1, self

    @property
    def are_off(self) -> bool:
        return not (self.min_expert_ratio or self.min_layer_ratio or self.protected_layers or self.tempering)


@dataclass(frozen=True)
class Budget:
    """How much is removed.

    Attributes:
        ratio: share of all routed atomic experts to remove, or of what they cost in `unit`, in [0, 1).
        scope: what is ranked together: "global" all layers (HEAPr-G of the paper), "layer" each layer by itself (HEAPr-L),
            "expert" each expert by itself. Layers ("layer", "expert") and experts ("expert") lose the same share t, to within half an
            atomic expert, with t such that the total is exact; if layers are protected, the others lose so much more.
        experts_per_token: K; at least so many experts of every layer keep at least one atomic expert.
        width_multiple: every expert's width becomes a multiple of it.
        uniform_width: what every expert of every layer gets (scope "expert"), chosen beforehand (`near_widths`); none leaves each its own.
        granularity: whole experts (not with scope "expert") are removed as near to the ratio as they come; layers ("layer") then
            lose the same share to within half an expert, and K experts of every layer stay whole.
        unit: what the ratio is a share of: "atomic_experts", or the routed experts' "flops" or "bytes" (`costs_of`).
        guards: what stays whatever it scores.
    """

    ratio: float
    scope: str
    experts_per_token: int
    width_multiple: int = 1
    uniform_width: int | None = None
    granularity: Granularity = Granularity.ATOMIC_EXPERT
    unit: str = "atomic_experts"
    guards: Guards = Guards()

    def __post_init__(self) -> None:
        assert 0 <= self.ratio < 1 and self.scope in {"global", "layer", "expert"}, (self.ratio, self.scope)
        assert self.uniform_width is None or (self.uniform_width > 0 and self.scope == "expert")
        assert self.granularity is Granularity.ATOMIC_EXPERT or self.scope != "expert"
        assert self.unit in {"atomic_experts", "flops", "bytes"}, self.unit
        assert self.is_plain or self.scope != "expert"

    @property
    def is_plain(self) -> bool:
        """Whether atomic experts are counted and nothing is guarded, as in the paper."""
        return self.unit == "atomic_experts" and self.guards.are_off

    def of_round(self, ratio: float, widths: Widths, original_widths: Widths, costs: Costs | None) -> Budget:
        """The budget for what an earlier round left, after which `ratio` of the original is gone; floors stay shares of the original."""
        total, left = (_size(each, costs) for each in (original_widths, widths))
        width = self._uniform_width_of_round(ratio, original_widths)
        if left == total:
            return replace(self, ratio=ratio, uniform_width=width)
        kept = total - round_half_up(ratio * total) if costs is None else (1 - ratio) * total
        guards = replace(self.guards, original_widths=original_widths)
        return replace(self, ratio=max(0.0, 1 - kept / left), uniform_width=width, guards=guards)

    def _uniform_width_of_round(self, ratio: float, original_widths: Widths) -> int | None:
        """On the way to the last round's width: the nearest to the ratio, and never below it."""
        if self.uniform_width is None or math.isclose(ratio, self.ratio):
            return self.uniform_width
        nearest = near_widths(the_width(original_widths), ratio, self.width_multiple)[0]
        return max(self.uniform_width, nearest)

    def check(self, widths: Widths) -> None:
        """Whatever can be refused before there are scores.

        Raises:
            ConfigError: a layer would keep fewer experts than a token needs, the guards leave too little to remove or name a
                layer that is not there, or widths are no multiples.
        """
        self._check_protected_layers(widths)
        if self.granularity is Granularity.EXPERT:
            self._check_whole_experts(widths)
        if self.unit == "atomic_experts":
            self.numbers_removed(widths)
        several = {width for width_E in widths.values() for width in width_E if width % self.width_multiple}
        if several and self.uniform_width is None:
            raise ConfigError(
                f"pruning.width_multiple={self.width_multiple}, but experts of this model have {min(several)} atomic experts, "
                f"which is no multiple of it; choose a divisor, for example {math.gcd(self.width_multiple, *several)}"
            )

    def numbers_removed(self, widths: Widths) -> list[int]:
        """How many atomic experts go: one number for all layers ("global"), else one per layer.

        Raises:
            ConfigError: the layers would keep fewer than must stay.
        """
        sizes, stay = self.sizes(widths), [self._least_kept(index, width_E) for index, width_E in widths.items()]
        total = sum(sizes.values())
        numbers, most = [round_half_up(self.ratio * total)], [total - sum(stay)]
        if self.scope != "global":
            free = [0 if index in self.guards.protected_layers else size for index, size in sizes.items()]
            numbers, most = equal_shares(free, numbers[0]), [size - least for size, least in zip(sizes.values(), stay, strict=True)]
        if any(number > limit for number, limit in zip(numbers, most, strict=True)):
            raise self.too_little_left()
        return numbers

    @staticmethod
    def sizes(widths: Widths) -> dict[int, int]:
        """Atomic experts of each layer."""
        return {index: sum(width_E) for index, width_E in widths.items()}

    def expert_floors(self, index: int, width_E: Sequence[int]) -> list[int]:
        """How many atomic experts of each expert of a layer stay: a multiple of `width_multiple`, as all widths."""
        original_E = (self.guards.original_widths or {index: width_E})[index]
        floors = [self._floor(self.guards.min_expert_ratio, original) for original in original_E]
        return [min(floor, width) for floor, width in zip(floors, width_E, strict=True)]

    def layer_floor(self, index: int, width_E: Sequence[int]) -> int:
        """How many atomic experts of a layer stay: all of a protected one, else a multiple of `width_multiple`."""
        if index in self.guards.protected_layers:
            return sum(width_E)
        original_E = (self.guards.original_widths or {index: width_E})[index]
        return min(self._floor(self.guards.min_layer_ratio, sum(original_E)), sum(width_E))

    def _floor(self, ratio: float, size: int) -> int:
        return math.ceil(ratio * size / self.width_multiple - ROUNDING_ERROR) * self.width_multiple

    def _least_kept(self, index: int, width_E: Sequence[int]) -> int:
        num_present = sum(width > 0 for width in width_E)
        return max(min(self.experts_per_token, num_present), sum(self.expert_floors(index, width_E)), self.layer_floor(index, width_E))

    def _check_protected_layers(self, widths: Widths) -> None:
        unknown, layers = set(self.guards.protected_layers) - set(widths), ", ".join(map(str, widths))
        if unknown:
            raise ConfigError(f"pruning.protected_layers: layer {min(unknown)} is no MoE layer of this model; choose of {layers}")
        if not set(widths) - set(self.guards.protected_layers):
            raise ConfigError(f"pruning.protected_layers protects every MoE layer ({layers}), so nothing can be removed; name fewer")

    def _check_whole_experts(self, widths: Widths) -> None:
        """At the least, the K narrowest experts of each layer stay."""
        if not self.is_plain:
            raise ConfigError(
                "pruning.budget, tempering, floors and protected_layers are for criteria that remove atomic experts, this one removes "
                "whole experts; choose another score or leave them at their defaults"
            )
        sizes = [sum(width_E) for width_E in widths.values()]
        stay = [sum(sorted(filter(None, width_E))[: self.experts_per_token]) for width_E in widths.values()]
        if self.scope == "global":
            sizes, stay = [sum(sizes)], [sum(stay)]
        if any(round_half_up(self.ratio * size) > size - least for size, least in zip(sizes, stay, strict=True)):
            raise self.too_little_left()

    def too_little_left(self) -> ConfigError:
        """The ratio is above what the guards and the experts per token leave."""
        if self.is_plain:
            return ConfigError(
                f"pruning.ratio={self.ratio} with scope '{self.scope}' would leave a layer fewer experts than the "
                f"{self.experts_per_token} that every token is routed to; choose a lower ratio"
            )
        return ConfigError(
            f"pruning.ratio={self.ratio} with scope '{self.scope}' is more of the {self.unit.replace('_', ' ')} than the floors, the "
            f"protected layers and the {self.experts_per_token} experts of every token leave to remove; choose a lower ratio or guard less"
        )


def the_width(widths: Widths) -> int:
    """The one width of all experts.

    Raises:
        ConfigError: they have several.
    """
    present = {width for width_E in widths.values() for width in width_E}
    if len(present) != 1:
        raise ConfigError(f"pruning.form=uniform needs experts of one width, this model has {len(present)}; use pruning.form=ragged")
    return present.pop()


def near_widths(width: int, ratio: float, multiple: int) -> list[int]:
    """What experts of one width may become: less than one multiple from width * (1 - ratio), nearest first, of two equally near ones the
    larger. Multiples from one multiple up, so never 0, and the width that there is."""
    exact = round(width * (1 - ratio), 9)  # 0.1 * 80 is 8.000000000000004 in some orders of the same sum
    candidates = {*range(multiple, width + 1, multiple), width}
    return sorted((each for each in candidates if abs(each - exact) < multiple), key=lambda each: (abs(each - exact), -each))


def equal_shares(sizes: Sequence[int], number: int) -> list[int]:
    """How many items of each group are among the first `number` of all, where the j-th of a group of s comes at the share (j - 1/2) / s;
    of equal shares the first group's.

    So there is one share t of which every group gives t s, rounded to the nearest number, and no group gives fewer when `number` grows.
    """
    total, margin = sum(sizes), len(sizes) / 2 + 1  # at the share (number - margin) / total no more than `number` have come
    counts = [max(0, math.ceil(size * (number - margin) / total - 0.5)) for size in sizes]
    groups = [group for group, size in enumerate(sizes) if size]
    while sum(counts) < number:
        counts[min(groups, key=lambda group: ((counts[group] + 0.5) / sizes[group], group))] += 1
    return counts


def _size(widths: Widths, costs: Costs | None) -> float:
    """All atomic experts, or what they cost."""
    if costs is None:
        return sum(sum(width_E) for width_E in widths.values())
    return sum(float((costs[index] * torch.tensor(width_E)).sum()) for index, width_E in widths.items())


def costs_of(unit: str, statistics: Statistics, parameters: Mapping[int, int]) -> Costs | None:
    """What an atomic expert costs, in any unit, because a budget is a share; none where atomic experts themselves are counted.

        "flops": n_e P_l     "bytes": P_l

    with n_e the number of calibration tokens that the router sends to expert e and P_l the weights of one atomic expert of layer l: every
    visit multiplies and adds each once. Bytes are atomic experts counted otherwise unless layers differ in model width.

    Args:
        parameters: P_l, by decoder layer index.
    """
    if unit == "atomic_experts":
        return None
    counts = {index: layer.count_E.double().cpu() for index, layer in statistics.layers.items()}
    return {
        index: parameters[index] * (count_E if unit == "flops" else count_E.new_ones(len(count_E))) for index, count_E in counts.items()
    }


def round_half_up(number: float) -> int:
    return math.floor(number + 0.5)
