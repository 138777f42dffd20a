"""Budgets: how much is removed, in which unit, and which layers are protected. Needs no model.

In: an experiment's settings, the widths of a model's experts, and statistics for the cost of atomic experts.
Out: how many atomic experts are removed, layer by layer.
Shape letters: E experts, K experts per token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from heapr.errors import ConfigError
from heapr.pruning.rounding import equal_shares, near_widths, round_half_up
from heapr.types import Granularity, Statistics

Widths = Mapping[int, Sequence[int]]  # atomic experts of every expert, by decoder layer index
Costs = Mapping[int, Tensor]  # cost of one atomic expert of each expert: float64 (E,), by decoder layer index


@dataclass(frozen=True)
class Budget:
    """How much is removed.

    Attributes:
        ratio: share to remove, in [0, 1), of the routed atomic experts or of their cost in `unit`.
        scope: what is ranked together: all layers ("global", HEAPr-G in the paper), each layer ("layer",
            HEAPr-L) or each expert ("expert"). With "layer" and "expert", all layers lose the same share t,
            to within half an atomic expert; with "expert", all experts do too. t is such that the total is
            exact.
        experts_per_token: K. At least K experts of every layer keep at least one atomic expert.
        width_multiple: every expert's width becomes a multiple of it.
        uniform_width: the width that every expert gets (scope "expert"), chosen beforehand (`near_widths`).
            With None, experts have individual widths.
        granularity: what is removed as one piece. Whole experts (not with scope "expert") are removed until
            the total is nearest to the ratio. With scope "layer", all layers lose the same share to within
            half an expert. K experts of every layer stay whole.
        unit: what the ratio is a share of: "atomic_experts", or the routed experts' "flops" (`costs_of`).
        protected_layers: decoder layer indices that lose nothing. The other layers lose correspondingly more.
        protected_experts: experts, each a decoder layer index and an index in it, that lose nothing.
        num_experts: how many experts every layer keeps, chosen beforehand (whole experts, scope "layer").
            With None, the ratio decides.
        one_width_per_layer: the experts of a layer get one width (scope "expert"), and the layers' widths
            follow from the scores of all layers.
    """

    ratio: float
    scope: str
    experts_per_token: int
    width_multiple: int = 1
    uniform_width: int | None = None
    granularity: Granularity = Granularity.ATOMIC_EXPERT
    unit: str = "atomic_experts"
    protected_layers: tuple[int, ...] = ()
    protected_experts: tuple[tuple[int, int], ...] = ()
    num_experts: int | None = None
    one_width_per_layer: bool = False

    def __post_init__(self) -> None:
        assert 0 <= self.ratio < 1, self.ratio
        assert self.scope in {"global", "layer", "expert"}, self.scope
        assert self.unit in {"atomic_experts", "flops"}, self.unit
        by_expert = self.scope == "expert"
        if by_expert:
            assert self.granularity is Granularity.ATOMIC_EXPERT
            assert self.is_plain
        if self.uniform_width is not None:
            assert self.uniform_width > 0
            assert by_expert
        if self.one_width_per_layer:
            assert self.uniform_width is None
            assert by_expert

    @property
    def is_plain(self) -> bool:
        """Whether atomic experts are counted and nothing is protected, as in the paper."""
        return self.unit == "atomic_experts" and not self.protected_layers and not self.protected_experts

    def protected_in(self, index: int) -> list[int]:
        """The protected experts of a layer."""
        return [expert for layer, expert in self.protected_experts if layer == index]

    def of_round(self, ratio: float, widths: Widths, original_widths: Widths, costs: Costs | None) -> Budget:
        """The budget of a round after which `ratio` of the original is removed.

        Args:
            ratio: removed after this round, as a share of the original.
            widths: what the earlier rounds left.
            original_widths: before the first round.
            costs: `costs_of` the unit.
        """
        width = self._uniform_width_of_round(ratio, original_widths)
        total = _size(original_widths, costs)
        left = _size(widths, costs)
        if left == total:
            return replace(self, ratio=ratio, uniform_width=width)
        kept = (1 - ratio) * total
        if costs is None:
            kept = total - round_half_up(ratio * total)
        of_left = max(0.0, 1 - kept / left)
        return replace(self, ratio=of_left, uniform_width=width)

    def _uniform_width_of_round(self, ratio: float, original_widths: Widths) -> int | None:
        """The multiple nearest to the round's ratio, but not below the width after the last round."""
        if self.uniform_width is None or math.isclose(ratio, self.ratio):
            return self.uniform_width
        nearest = near_widths(the_width(original_widths), ratio, self.width_multiple)[0]
        return max(self.uniform_width, nearest)

    def check(self, widths: Widths) -> None:
        """Check everything that can be checked before there are scores.

        Raises:
            ConfigError: a layer would keep fewer experts than a token needs; the protected layers do not
                exist or leave too little to remove; or the widths are not multiples of `width_multiple`.
        """
        self._check_protected_layers(widths)
        if self.granularity is Granularity.EXPERT:
            self._check_whole_experts(widths)
        if self.unit == "atomic_experts":
            self.numbers_removed(widths)
        if self.uniform_width is None:
            self._check_multiples(widths)
        if self.one_width_per_layer:
            self._check_one_width_per_layer(widths)

    def numbers_removed(self, widths: Widths) -> list[int]:
        """How many atomic experts are removed: one number with scope "global", else one per layer.

        Raises:
            ConfigError: the layers would keep fewer atomic experts than must stay.
        """
        removable = []
        free = []
        for index, width_E in widths.items():
            size = sum(width_E)
            is_protected = index in self.protected_layers
            removable.append(size - self._least_kept(index, width_E))
            free.append(0 if is_protected else size)
        total = sum(map(sum, widths.values()))
        number = round_half_up(self.ratio * total)
        if self.scope == "global":
            numbers = [number]
            removable = [sum(removable)]
        else:
            numbers = equal_shares(free, number)
        self._check_removable(numbers, removable)
        return numbers

    def _least_kept(self, index: int, width_E: Sequence[int]) -> int:
        """Atomic experts of a layer that must stay.

        All if it is protected, else those of protected experts, and one in each of K experts.
        """
        if index in self.protected_layers:
            return sum(width_E)
        num_present = sum(width > 0 for width in width_E)
        stay = [width_E[expert] for expert in self.protected_in(index)]
        num_others = max(0, min(self.experts_per_token, num_present) - len(stay))
        return sum(stay) + num_others

    def _check_removable(self, numbers: Sequence[int], removable: Sequence[int]) -> None:
        """Refuse to remove more than the limits."""
        for number, limit in zip(numbers, removable, strict=True):
            if number > limit:
                raise self.too_little_left()

    def _check_protected_layers(self, widths: Widths) -> None:
        """Check that protected layers exist, and that some layer is not protected."""
        layers = ", ".join(map(str, widths))
        unknown = set(self.protected_layers) - set(widths)
        if unknown:
            reason = f"layer {min(unknown)} is not an MoE layer of this model"
            raise ConfigError(f"pruning.protected_layers: {reason}; choose from {layers}")
        if not set(widths) - set(self.protected_layers):
            reason = f"pruning.protected_layers protects every MoE layer ({layers})"
            raise ConfigError(f"{reason}, so nothing can be removed; name fewer")

    def _check_multiples(self, widths: Widths) -> None:
        """Check that every width is a multiple of `width_multiple`."""
        others = {width for width_E in widths.values() for width in width_E if width % self.width_multiple}
        if others:
            divisor = math.gcd(self.width_multiple, *others)
            raise ConfigError(
                f"pruning.width_multiple={self.width_multiple}, but experts of this model have {min(others)} "
                f"atomic experts, which is not a multiple of it; choose a divisor, for example {divisor}"
            )

    def _check_one_width_per_layer(self, widths: Widths) -> None:
        """Check that the experts of each layer have one width."""
        for index, width_E in widths.items():
            num_widths = len(set(width_E))
            if num_widths > 1:
                raise ConfigError(
                    f"pruning.form=per_layer needs experts of one width in each layer, layer {index} has "
                    f"{num_widths} widths; use pruning.form=ragged"
                )

    def _check_whole_experts(self, widths: Widths) -> None:
        """Check that the ratio is reached even if the experts that stay are the K narrowest of each layer.

        Raises:
            ConfigError: it cannot be reached, or an option is for atomic experts only.
        """
        if not self.is_plain:
            raise ConfigError(
                "pruning.budget and pruning.protected_layers are for criteria that remove atomic experts, "
                "but this one removes whole experts; choose another score or leave them at their defaults"
            )
        sizes = []
        stay = []
        for width_E in widths.values():
            present = filter(None, width_E)
            narrowest = sorted(present)[: self.experts_per_token]
            sizes.append(sum(width_E))
            stay.append(sum(narrowest))
        if self.scope == "global":
            sizes = [sum(sizes)]
            stay = [sum(stay)]
        numbers = [round_half_up(self.ratio * size) for size in sizes]
        removable = [size - least for size, least in zip(sizes, stay, strict=True)]
        self._check_removable(numbers, removable)

    def too_little_left(self) -> ConfigError:
        """The error for a ratio above what the protected layers and the experts per token leave."""
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
    """The width that all experts share.

    Raises:
        ConfigError: they have several widths.
    """
    present: set[int] = set()
    for width_E in widths.values():
        present.update(width_E)
    if len(present) != 1:
        reason = f"pruning.form=uniform needs experts of one width, this model has {len(present)}"
        raise ConfigError(f"{reason}; use pruning.form=ragged")
    return present.pop()


def costs_of(unit: str, statistics: Statistics, parameters: Mapping[int, int]) -> Costs | None:
    """Cost of an atomic expert, up to a common factor. None for "atomic_experts".

        "flops": n_e P_l

    with n_e the number of calibration tokens routed to expert e, and P_l the number of weights of one atomic
    expert of layer l: each visit multiplies and adds every weight once.

    Args:
        unit: "atomic_experts" or "flops".
        statistics: of the calibration.
        parameters: P_l, by decoder layer index.
    """
    if unit == "atomic_experts":
        return None
    costs = {}
    for index, layer in statistics.layers.items():
        count_E = layer.count_E.double().cpu()
        costs[index] = parameters[index] * count_E
    return costs


def cost_of_layer(cost_E: Tensor, width_E: Sequence[int]) -> float:
    """Cost of all atomic experts of a layer."""
    of_expert_E = cost_E * torch.tensor(width_E)
    return float(of_expert_E.sum())


def _size(widths: Widths, costs: Costs | None) -> float:
    """Number of all atomic experts, or their cost."""
    if costs is None:
        return sum(map(sum, widths.values()))
    return sum(cost_of_layer(costs[index], width_E) for index, width_E in widths.items())
