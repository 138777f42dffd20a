"""The forward that is traced as a whole gives what the loop gives, gradients too, for every way to store experts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from heapr.model.experts.layout import Experts, layout_of
from heapr.model.experts.loop import run_experts
from heapr.model.experts.traced import run_traced
from heapr.model.moe import MoEModel
from heapr.pruning.surgery import remove
from heapr.types import Plan
from tests.same import ROUNDING, logits
from tests.tiny import LAYOUTS, tiny_ids, tiny_model


def ragged(family: str) -> MoEModel:
    """Widths 0, 8 and between, and an expert that no token goes to."""
    model = MoEModel(tiny_model(family))
    kept_EF = torch.arange(8) < torch.tensor([[0], [8], [3], [5]])
    remove(model, Plan(layers={layer.index: kept_EF for layer in model.layers}))
    return model


def inputs_of(experts: Experts, num_tokens: int = 11) -> tuple[Tensor, ...]:
    """Hidden states and routing, with pairs that have no expert; expert 1 gets no token."""
    generator = torch.Generator().manual_seed(0)
    hidden_TD = torch.randn(num_tokens, experts.down_proj.shape[1], generator=generator)
    if layout_of(experts).weighs_input:
        of_each_ETD = hidden_TD * (torch.rand(4, num_tokens, 1, generator=generator) < 0.5)
        of_each_ETD[1] = 0
        return (of_each_ETD.flatten(0, 1).requires_grad_(),)
    allowed = torch.tensor([0, 2, 3, 4])
    columns = [torch.randperm(4, generator=generator)[:2] for _ in range(num_tokens)]
    router_weight_TK = torch.rand(num_tokens, 2, generator=generator)
    return hidden_TD.requires_grad_(), allowed[torch.stack(columns)], router_weight_TK.requires_grad_()


@pytest.mark.parametrize("family", LAYOUTS)
def test_it_gives_what_the_loop_gives_with_all_gradients(family: str) -> None:
    experts = ragged(family).layers[0].experts
    inputs = inputs_of(experts)
    wanted = [tensor for tensor in [*inputs, *experts.parameters()] if tensor.is_floating_point()]
    outputs, grads = [], []
    for run in (run_experts, run_traced):
        outputs.append(run(experts, *inputs))
        grads.append(torch.autograd.grad(outputs[-1].square().sum(), wanted, allow_unused=True))
    torch.testing.assert_close(outputs[1], outputs[0], **ROUNDING)
    for found, expected in zip(*reversed(grads), strict=True):
        torch.testing.assert_close(
            found, torch.zeros_like(found) if expected is None else expected, rtol=1e-4, atol=1e-5
        )


def test_its_operators_keep_what_they_promise_to_torch() -> None:
    """Shapes without data, no argument changed, gradients registered."""
    ops = torch.ops.heapr
    count_E1, widths = torch.tensor([2, 0, 1, 1]), [3, 0, 2]
    hidden_SD = torch.randn(4, 6, requires_grad=True)
    weight_RD = torch.randn(10, 6, requires_grad=True)
    expanded_SP = torch.randn(4, 6, requires_grad=True)
    for operator, arguments in (
        (ops.expand_segments, (hidden_SD, weight_RD)),
        (ops.contract_segments, (expanded_SP, weight_RD)),
    ):
        torch.library.opcheck(operator.default, (*arguments, count_E1, widths, 2))
    outer = (expanded_SP.detach(), hidden_SD.detach(), count_E1, widths, 2)
    torch.library.opcheck(ops.outer_segments.default, outer)


def test_a_ragged_model_compiles_without_a_break() -> None:
    model = ragged("qwen3_moe").model
    ids_NW = tiny_ids(2, 12)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(logits(compiled, ids_NW), logits(model, ids_NW), **ROUNDING)
