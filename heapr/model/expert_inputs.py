"""The inputs of one layer's experts, and the output of its decoder layer without them.

In: a model and a batch whose tape has reached the layer. Out: `ExpertInputs`, and hidden states.
Shape letters: T tokens, D model width, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from heapr.model.experts.dispatch import use_heapr_experts
from heapr.model.experts.grouped import run_fastest
from heapr.model.experts.layout import Experts, layout_of, routing_of
from heapr.model.experts.ragged import RaggedExperts
from heapr.model.moe import MoELayer, MoEModel
from heapr.model.span import Reached, run_span
from heapr.model.tape import Tape, hidden_of


@dataclass(frozen=True)
class ExpertInputs:
    """The inputs of a layer's experts.

    Attributes:
        hidden_TD: the tokens. In families that weigh the input: one weighted row for each (token, expert)
            pair.
        expert_TK: experts of each token; expert number E stands for no expert.
        router_weight_TK: their router weights p.
    """

    hidden_TD: Tensor
    expert_TK: Tensor
    router_weight_TK: Tensor

    def __post_init__(self) -> None:
        assert self.expert_TK.shape == self.router_weight_TK.shape
        assert len(self.expert_TK) == len(self.hidden_TD)

    def weighted(self, weight_T: Tensor) -> ExpertInputs:
        """The same inputs with p times the token's weight: its squared error then counts weight^2 times."""
        weighted_TK = self.router_weight_TK.float() * weight_T.unsqueeze(1)
        return replace(self, router_weight_TK=weighted_TK)

    def first(self, number: int) -> ExpertInputs:
        """The inputs of the first tokens."""
        return ExpertInputs(self.hidden_TD[:number], self.expert_TK[:number], self.router_weight_TK[:number])

    def pairs(self, num_experts: int) -> list[tuple[Tensor, Tensor]]:
        """For each expert, the indices of its n tokens, and their router weights."""
        expert_S = self.expert_TK.flatten()
        order_S = expert_S.argsort(stable=True)
        token_S = order_S // self.expert_TK.shape[1]
        p_S = self.router_weight_TK.flatten()[order_S]
        # The only wait for a device.
        counts = torch.bincount(expert_S, minlength=num_experts + 1).tolist()
        of_experts = list(zip(token_S.split(counts), p_S.split(counts), strict=True))
        return of_experts[:num_experts]


def expert_inputs(model: MoEModel, tape: Tape, layer: MoELayer) -> ExpertInputs:
    """The inputs of a layer's experts; neither the experts nor anything behind them runs."""
    inputs, _ = _run_layer(model, tape, layer, beyond=False)
    return inputs


def without_experts(model: MoEModel, tape: Tape, layer: MoELayer) -> tuple[ExpertInputs, Tensor]:
    """The inputs of a layer's experts, and the hidden states behind its decoder layer without the experts."""
    inputs, without = _run_layer(model, tape, layer, beyond=True)
    assert without is not None
    return inputs, without


def without_atomic_experts(experts: Experts) -> RaggedExperts:
    """The same experts with no atomic experts left: they put out the biases of W_down, if there are any."""
    empty = RaggedExperts(experts, [0] * experts.num_experts)
    if layout_of(experts).has_bias:
        empty.down_proj_bias.copy_(experts.down_proj_bias)
    return empty


def _run_layer(
    model: MoEModel, tape: Tape, layer: MoELayer, *, beyond: bool
) -> tuple[ExpertInputs, Tensor | None]:
    """Inputs of the experts and, if `beyond`, the hidden states behind the decoder layer without them."""
    inputs: list[ExpertInputs] = []

    def take_inputs(experts: Experts, hidden_TD: Tensor, *routing: Tensor) -> Tensor:
        assert experts is layer.experts
        inputs.append(_compact(experts, hidden_TD, *routing))
        if not beyond:
            raise Reached
        return run_fastest(without_atomic_experts(experts), hidden_TD, *routing)

    span = range(layer.index, layer.index + 1)
    with use_heapr_experts(model.model, take_inputs):
        outputs = run_span(model, tape.ids_NW, span, tape.answers(layer.index))
    assert len(inputs) == 1, f"the experts of layer {layer.index} ran {len(inputs)} times"
    without = hidden_of(outputs[0]) if beyond else None
    return inputs[0], without


def _compact(experts: Experts, hidden_TD: Tensor, *routing: Tensor) -> ExpertInputs:
    """Inputs with their routing.

    In families that weigh the input, only the rows that were routed are kept, each as one token.
    """
    expert_TK, router_weight_TK = routing_of(experts, hidden_TD, *routing)
    if layout_of(experts).weighs_input:
        routed_T = expert_TK.squeeze(1) < experts.num_experts
        return ExpertInputs(hidden_TD[routed_T], expert_TK[routed_T], router_weight_TK[routed_T])
    return ExpertInputs(hidden_TD, expert_TK, router_weight_TK)
