"""Super experts: the few whose outputs are far larger than all others', for the sake of attention sinks.

In: statistics and the largest weights of W_down. Out: which experts they are, and how large.
Shape letters: E experts, F atomic experts of the widest expert.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from heapr.types import Statistics

QUANTILE = 0.995  # of all experts
SHARE_OF_LARGEST = 0.1
MAX_NAMED = 4  # in a line


class SuperExpert(NamedTuple):
    """One of them.

    Attributes:
        layer, expert: decoder layer index, and index of the expert in it.
        largest: a_e.
        times_median: a_e as a multiple of the median over all experts.
    """

    layer: int
    expert: int
    largest: float
    times_median: float


def find_super_experts(
    statistics: Statistics, down_max_of: Callable[[int], Tensor]
) -> tuple[SuperExpert, ...]:
    """The experts whose largest contribution to the residual stream is far above that of the others, largest
    first.

    a_e is the largest element of what any of an expert's atomic experts adds for any calibration token:

        a_e = max over k of [max over tokens |p h_k|] [max over d |w_kd|]                    (24)

    with p the router weight, h_k the activation and w_k column k of W_down. An expert is a super expert if
    a_e is above the 99.5 % quantile of all experts and above a tenth of the largest (Su et al., "Unveiling
    Super Experts in Mixture-of-Experts Large Language Models", arXiv 2507.23279, who take the whole expert's
    output in place of single atomic experts'). The largest expert is one by this definition; how often it is
    larger than the median tells whether it matters.

    Args:
        statistics: of the dense model.
        down_max_of: max over d of |w_kd|, (E, F), by decoder layer index.
    """
    largest: dict[int, Tensor] = {}
    for index, layer in statistics.layers.items():
        ph_abs_max_EF = layer.ph_abs_max_EF.cpu().double()
        contribution_EF = ph_abs_max_EF * down_max_of(index).cpu().double()
        largest[index] = contribution_EF.amax(dim=1)  # (24)
    all_E = torch.cat(list(largest.values()))
    bound = max(float(all_E.quantile(QUANTILE)), SHARE_OF_LARGEST * float(all_E.max()))
    median = max(float(all_E.median()), torch.finfo(torch.float64).tiny)
    found = []
    for index, largest_E in largest.items():
        for expert in (largest_E > bound).nonzero().flatten().tolist():
            value = float(largest_E[expert])
            found.append(SuperExpert(index, expert, value, value / median))
    return tuple(sorted(found, key=lambda each: -each.largest))


def describe_super_experts(found: Sequence[SuperExpert]) -> str:
    """One line on them."""
    named = [f"layer {each.layer} expert {each.expert} ({each.times_median:.3g} x)" for each in found]
    more = f" and {len(named) - MAX_NAMED} more" if len(named) > MAX_NAMED else ""
    listed = ", ".join(named[:MAX_NAMED])
    return f"super experts, by their largest |p h w| over the median expert's: {listed}{more}"
