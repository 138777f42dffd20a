"""The interface of repair methods, and what they report for a layer.

In: the experts of one layer before and after surgery, and their inputs. Out: the experts after surgery,
changed in place, and how much of the squared error is left. The methods are in `repair.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from heapr.model.expert_inputs import ExpertInputs
from heapr.model.experts.layout import Experts, matrices_of
from heapr.model.experts.ragged import RaggedExperts
from heapr.model.stream import StreamTarget
from heapr.ranks import ONE_PROCESS, Ranks


@dataclass(frozen=True)
class LayerRepair:
    """What a repair found for one layer.

    Attributes:
        error_before: squared error per token before repair, without the ridge's penalty.
        error_after: the same after repair; never larger than `error_before`.
        num_repaired: experts whose weights changed.
    """

    error_before: float
    error_after: float
    num_repaired: int


def report_repair(found: Mapping[int, LayerRepair]) -> dict[str, Any]:
    """Report the error per token before and after, by decoder layer index. JSON types only."""
    before = sum(layer.error_before for layer in found.values())
    after = sum(layer.error_after for layer in found.values())
    summary = "nothing was lost, so nothing was repaired"
    if before > 0:
        share = after / before
        summary = f"repair reduces the squared error of the layers' outputs to {share:.1%}"
    layers = {str(index): asdict(layer) for index, layer in found.items()}
    return {"layers": layers, "summary": [summary], "not_reached": []}


class Repair(Protocol):
    """A repair method.

    Attributes:
        is_sequential: inputs are measured with the layers before already repaired. If false, they come from
            the unpruned model.
        refits_inputs: W_gate and W_up change too, not only W_down.
        follows_stream: a layer also compensates for the changes in earlier layers.
    """

    is_sequential: bool
    refits_inputs: bool
    follows_stream: bool

    def __call__(
        self,
        before: Experts,
        after: RaggedExperts,
        inputs: ExpertInputs,
        *,
        target: StreamTarget | None = None,
        ranks: Ranks = ONE_PROCESS,
    ) -> LayerRepair:
        """Change the kept weights of one layer's experts, in place.

        Args:
            before, after: the experts before and after surgery.
            inputs: the layer's.
            target: what the experts' outputs should sum to. With None, the target is their sum before
                surgery.
            ranks: the processes that repair together, each with inputs of its own. Sums over tokens are added
                over all of them, so that all find the same weights.
        """
        ...


def copy_weights(experts: Experts, *, with_inputs: bool) -> list[list[Tensor]]:
    """A copy of every expert's columns of W_down and, on request, its rows of W_gate and W_up."""
    copies = []
    for parts in _changeable(experts, with_inputs=with_inputs):
        of_expert = [part.clone() for part in parts]
        copies.append(of_expert)
    return copies


def num_changed(experts: Experts, old: Sequence[Sequence[Tensor]], *, with_inputs: bool) -> int:
    """Experts of which at least one weight differs from its copy."""
    number = 0
    for new_parts, old_parts in zip(_changeable(experts, with_inputs=with_inputs), old, strict=True):
        is_same = all(map(torch.equal, new_parts, old_parts))
        number += not is_same
    return number


def _changeable(experts: Experts, *, with_inputs: bool) -> Iterator[list[Tensor]]:
    """What repair may change of every expert, in the experts' own memory."""
    for matrices in matrices_of(experts):
        parts = [matrices.down_DF.detach()]
        if with_inputs:
            parts.append(matrices.inputs_GD.detach())
        yield parts
