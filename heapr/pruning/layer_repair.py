"""What a way to repair is, and what it finds for a layer.

In: the experts of one layer before and after surgery, and their inputs. Out: the latter experts, changed in
place, and how much of the squared error is left. The ways that exist are in `repair.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from heapr.model.expert_inputs import ExpertInputs
from heapr.model.experts.layout import Experts
from heapr.model.experts.ragged import RaggedExperts
from heapr.model.stream import StreamTarget


@dataclass(frozen=True)
class LayerRepair:
    """What a repair found for one layer.

    Attributes:
        error_before, error_after: squared error per token, without the ridge's penalty; never larger after.
        num_repaired: experts whose weights changed.
    """

    error_before: float
    error_after: float
    num_repaired: int


def report_repair(found: Mapping[int, LayerRepair]) -> dict[str, Any]:
    """Errors per token before and after, by decoder layer index; JSON types only."""
    before = sum(layer.error_before for layer in found.values())
    after = sum(layer.error_after for layer in found.values())
    summary = "nothing was lost, nothing repaired"
    if before > 0:
        summary = f"repair leaves {after / before:.1%} of the layers' squared error"
    layers = {str(index): asdict(layer) for index, layer in found.items()}
    return {"layers": layers, "summary": [summary], "not_reached": []}


class Repair(Protocol):
    """A way to repair."""

    is_sequential: bool  # inputs come from behind the repaired layers, else from the unpruned model
    refits_inputs: bool  # changes W_gate and W_up too, not only W_down
    follows_stream: bool  # makes up for the changes of earlier layers too

    def __call__(
        self,
        before: Experts,
        after: RaggedExperts,
        inputs: ExpertInputs,
        *,
        target: StreamTarget | None = None,
    ) -> LayerRepair:
        """Change the kept weights of one layer's experts, in place.

        Args:
            before, after: the experts before and after surgery.
            inputs: of the layer.
            target: what the experts' outputs should sum to. With None, to what they summed to before surgery.
        """
        ...
