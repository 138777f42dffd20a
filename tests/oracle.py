"""Slow oracles, written from the formulas and sharing no code with the package.

`published_scores` is (3) and (4) of docs/method.md to the letter: the gradient at every expert's output, the
D x D matrix G_e, and 1/2 e_k(x)^T G_e e_k(x) for every token. `visited_scores` is the other criteria that
have data, visit by visit. `streams_behind` is the residual stream in one plain pass.
"""

from __future__ import annotations

from collections import defaultdict
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS


class Visit:
    """One token in one expert."""

    def __init__(self, h_F: Tensor, output_D: Tensor, router_weight: Tensor) -> None:
        self.h_F, self.output_D, self.router_weight = h_F, output_D, router_weight


def _is_routed(module: nn.Module) -> bool:
    return (
        type(module).__name__.endswith("Experts")
        and hasattr(module, "down_proj")
        and hasattr(module, "num_experts")
    )


def expert_weights(experts: nn.Module, expert: int) -> tuple[Tensor, Tensor]:
    """Input projection (rows, D) and down projection (D, F) of one expert, whatever way the family stores
    them."""
    inputs = (experts.gate_up_proj if hasattr(experts, "gate_up_proj") else experts.up_proj)[expert]
    down = experts.down_proj[expert]
    return (inputs.T, down.T) if getattr(experts, "is_transposed", True) else (inputs, down)


def visit(experts: nn.Module, expert: int, x_D: Tensor) -> tuple[Tensor, Tensor]:
    """h and E(x) of one token in one expert."""
    inputs_GD, down_DF = expert_weights(experts, expert)
    pre_G = inputs_GD @ x_D
    if getattr(experts, "has_bias", False):
        pre_G = pre_G + experts.gate_up_proj_bias[expert]
    if not hasattr(experts, "_apply_gate"):  # Llama-4
        width = down_DF.shape[1]
        h_F = experts.act_fn(pre_G[:width]) * pre_G[width:]
    else:
        h_F = experts._apply_gate(pre_G) if experts.has_gate else experts.act_fn(pre_G)
    output_D = down_DF @ h_F
    if getattr(experts, "has_bias", False):
        output_D = output_D + experts.down_proj_bias[expert]
    return h_F, output_D


def visits_of(
    model: PreTrainedModel, ids_NW: Tensor, predicted_NW: Tensor | None = None
) -> dict[nn.Module, dict[int, list[Visit]]]:
    """Every visit of a token to an expert, with gradients of the summed loss at the expert's output and at
    h. The loss is over the tokens that `predicted_NW` marks with 1, by default all but the first."""
    visits: dict[nn.Module, dict[int, list[Visit]]] = defaultdict(lambda: defaultdict(list))

    def seen(experts: nn.Module, expert: int, x_D: Tensor, weight: Tensor) -> Tensor:
        h_F, output_D = visit(experts, expert, x_D)
        h_F.retain_grad()
        output_D.retain_grad()
        visits[experts][expert].append(Visit(h_F, output_D, weight))
        return weight * output_D

    def token_by_token(self: nn.Module, hidden_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
        rows = []
        for x_D, experts_K, weights_K in zip(hidden_TD, expert_TK, weight_TK, strict=True):
            total = torch.zeros_like(x_D)
            for expert, weight in zip(experts_K.tolist(), weights_K, strict=True):
                total = total + seen(self, expert, x_D, weight)
            rows.append(total)
        return torch.stack(rows)

    def expert_by_expert(self: nn.Module, hidden_SD: Tensor) -> Tensor:
        """Llama-4: for every expert all tokens times their router weight, which is zero where they were not
        routed."""
        rows = []
        for expert, hidden_TD in enumerate(hidden_SD.chunk(self.num_experts)):
            rows += [
                seen(self, expert, x_D, torch.ones(())) if (x_D != 0).any() else torch.zeros_like(x_D)
                for x_D in hidden_TD
            ]
        return torch.stack(rows)

    outside = [module for module in model.modules() if type(module).__name__ == "Llama4TextExperts"]
    for experts in outside:
        experts.forward = partial(expert_by_expert, experts)
    ALL_EXPERTS_FUNCTIONS.register("oracle", token_by_token)
    previous = model.get_experts_implementation()
    model.set_experts_implementation("oracle")
    logits = model(input_ids=ids_NW, use_cache=False).logits
    model.set_experts_implementation(previous)
    for experts in outside:
        del experts.forward
    log_probs = torch.log_softmax(logits[:, :-1].float(), dim=-1)
    losses = -log_probs.gather(2, ids_NW[:, 1:, None]).squeeze(2)
    if predicted_NW is not None:
        losses = losses * predicted_NW[:, 1:]
    losses.sum().backward()
    return visits


def published_scores(model: PreTrainedModel, ids_NW: Tensor) -> list[Tensor]:
    """HEAPr's two-stage score with explicit D x D matrices, one (E, F) tensor per MoE layer; -1 where no
    token came."""
    visits = visits_of(model, ids_NW)
    scores = []
    for experts in [module for module in model.modules() if _is_routed(module)]:
        width = expert_weights(experts, 0)[1].shape[1]
        score_EF = torch.full((experts.num_experts, width), -1.0, dtype=torch.float64)
        for expert, seen in visits[experts].items():
            gradients = [visit.output_D.grad.double() for visit in seen]
            G_DD = sum(torch.outer(g, g) for g in gradients) / len(gradients)
            down_DF = expert_weights(experts, expert)[1].detach().double()
            terms = []
            for visited in seen:
                atomic_FD = (visited.h_F.detach().double() * down_DF).T  # e_k(x) = h_k(x) w_k
                terms.append(0.5 * torch.stack([e_D @ G_DD @ e_D for e_D in atomic_FD]))
            score_EF[expert] = torch.stack(terms).mean(0)
        scores.append(score_EF)
    return scores


def visited_scores(model: PreTrainedModel, ids_NW: Tensor, alpha: float) -> dict[str, list[Tensor]]:
    """`taylor`, `activation`, `camera`, `reap` and `frequency`: one float64 (E, F) tensor each per MoE layer;
    -1 where no token came."""
    visits = visits_of(model, ids_NW)
    scores: dict[str, list[Tensor]] = defaultdict(list)
    for experts in [module for module in model.modules() if _is_routed(module)]:
        width = expert_weights(experts, 0)[1].shape[1]
        for name in ("taylor", "activation", "camera", "reap", "frequency"):
            scores[name].append(torch.full((experts.num_experts, width), -1.0, dtype=torch.float64))
        for expert, seen in visits[experts].items():
            down_DF = expert_weights(experts, expert)[1].detach().double()
            n = len(seen)
            scores["frequency"][-1][expert] = n
            scores["reap"][-1][expert] = (
                sum(abs(v.router_weight.item()) * v.output_D.detach().double().norm() for v in seen) / n
            )
            for k in range(width):
                w_sq = sum(float(w) ** 2 for w in down_DF[:, k])
                h = [v.h_F[k].item() for v in seen]
                weighted_sq = [(v.router_weight.item() * v.h_F[k].item()) ** 2 for v in seen]
                scores["taylor"][-1][expert, k] = abs(
                    sum(v.h_F[k].item() * v.h_F.grad[k].item() for v in seen)
                )
                scores["activation"][-1][expert, k] = sum(value**2 for value in h) / n * w_sq
                scores["camera"][-1][expert, k] = (
                    (1 - alpha) * sum(weighted_sq) + alpha * max(weighted_sq)
                ) * w_sq
    return scores


@torch.no_grad()
def streams_behind(body: nn.Module, decoder_layers: list[nn.Module], ids_NW: Tensor) -> list[Tensor]:
    """The residual stream behind every decoder layer (T, D)."""
    seen: list[Tensor] = []
    hooks = [
        decoder.register_forward_hook(
            lambda *arguments: seen.append(
                arguments[-1][0] if isinstance(arguments[-1], tuple) else arguments[-1]
            )
        )
        for decoder in decoder_layers
    ]
    body(input_ids=ids_NW, use_cache=False)
    for hook in hooks:
        hook.remove()
    return [hidden.flatten(0, 1) for hidden in seen]
