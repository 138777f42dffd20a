"""Slow oracles, written from the formulas and sharing no code with the package.

`published_scores` is (3) and (4) of docs/method.md to the letter: the gradient at every expert's output, the D x D matrix G_e, and
1/2 e_k(x)^T G_e e_k(x) for every token.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS


class Visit:
    """One token in one expert."""

    def __init__(self, h_F: Tensor, output_D: Tensor, router_weight: Tensor) -> None:
        self.h_F, self.output_D, self.router_weight = h_F, output_D, router_weight


def visits_of(model: PreTrainedModel, ids_NW: Tensor) -> dict[nn.Module, dict[int, list[Visit]]]:
    """Every visit of a token to an expert, with gradients of the summed loss at the expert's output and at h."""
    visits: dict[nn.Module, dict[int, list[Visit]]] = defaultdict(lambda: defaultdict(list))

    def token_by_token(self: nn.Module, hidden_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
        rows = []
        for x_D, experts_K, weights_K in zip(hidden_TD, expert_TK, weight_TK, strict=True):
            total = torch.zeros_like(x_D)
            for expert, weight in zip(experts_K.tolist(), weights_K, strict=True):
                width = self.down_proj.shape[2]
                gate_F = self.gate_up_proj[expert, :width] @ x_D
                h_F = torch.nn.functional.silu(gate_F) * (self.gate_up_proj[expert, width:] @ x_D)
                output_D = self.down_proj[expert] @ h_F
                h_F.retain_grad()
                output_D.retain_grad()
                visits[self][expert].append(Visit(h_F, output_D, weight))
                total = total + weight * output_D
            rows.append(total)
        return torch.stack(rows)

    ALL_EXPERTS_FUNCTIONS.register("oracle", token_by_token)
    previous = model.config._experts_implementation
    model.set_experts_implementation("oracle")
    logits = model(input_ids=ids_NW, use_cache=False).logits
    model.set_experts_implementation(previous)
    log_probs = torch.log_softmax(logits[:, :-1].float(), dim=-1)
    (-log_probs.gather(2, ids_NW[:, 1:, None]).sum()).backward()
    return visits


def published_scores(model: PreTrainedModel, ids_NW: Tensor) -> list[Tensor]:
    """HEAPr's two-stage score with explicit D x D matrices, one (E, F) tensor per MoE layer; -1 where no token came."""
    visits = visits_of(model, ids_NW)
    scores = []
    for experts in [module for module in model.modules() if hasattr(module, "gate_up_proj")]:
        score_EF = torch.full((experts.num_experts, experts.down_proj.shape[2]), -1.0, dtype=torch.float64)
        for expert, seen in visits[experts].items():
            gradients = [visit.output_D.grad.double() for visit in seen]
            G_DD = sum(torch.outer(g, g) for g in gradients) / len(gradients)
            down_DF = experts.down_proj[expert].detach().double()
            terms = []
            for visit in seen:
                atomic_FD = (visit.h_F.detach().double() * down_DF).T  # e_k(x) = h_k(x) w_k
                terms.append(0.5 * torch.stack([e_D @ G_DD @ e_D for e_D in atomic_FD]))
            score_EF[expert] = torch.stack(terms).mean(0)
        scores.append(score_EF)
    return scores
