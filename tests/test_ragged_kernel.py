"""The candidate kernel for ragged experts, in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from benchmarks.gpu import ragged_kernel
from benchmarks.gpu.ragged_kernel import run_persistent
from benchmarks.gpu.shapes import TOY, dense_experts, ragged_experts, routed_tokens
from heapr.model.experts.loop import run_experts
from heapr.model.experts.ragged import RaggedExperts

pytestmark = pytest.mark.kernel
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The interpreter multiplies the bits of bfloat16 numbers as if they were integers.
HALF = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16
WIDTHS = [70, 3, 0, 128, 64, 1, 30, 17]


def layer_of(widths: list[int], num_tokens: int, dtype: torch.dtype) -> tuple[RaggedExperts, list[Tensor]]:
    """Experts whose outputs are of order 1, and tokens; some pairs have no expert."""
    experts = ragged_experts(dense_experts(TOY, DEVICE), widths).to(dtype)
    for parameter in experts.parameters():
        parameter.mul_(15)
    hidden_TD, expert_TK, p_TK = routed_tokens(TOY, num_tokens, DEVICE)
    expert_TK[::5, 0] = len(widths)
    return experts, [hidden_TD.to(dtype), expert_TK, p_TK.to(dtype)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (HALF, 1e-2)])
@pytest.mark.parametrize("num_tokens", [5, 90], ids=["decode", "prefill"])
def test_the_kernel_gives_the_float64_loop(
    dtype: torch.dtype, tolerance: float, num_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison_new_memory(monkeypatch)
    experts, tokens = layer_of(WIDTHS, num_tokens, dtype)
    got = run_persistent(experts, *tokens)
    wide = [tensor.double() if tensor.is_floating_point() else tensor for tensor in tokens]
    expected = run_experts(copy.deepcopy(experts).double(), *wide)
    assert got.dtype == dtype and (got.double() - expected).norm() <= tolerance * expected.norm()


def poison_new_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    new_empty = Tensor.new_empty

    def poisoned(self: Tensor, *size: int, **options: object) -> Tensor:
        empty = new_empty(self, *size, **options)
        return empty.fill_(float("nan")) if empty.is_floating_point() else empty

    monkeypatch.setattr(Tensor, "new_empty", poisoned)


def test_experts_without_atomic_experts_contribute_nothing() -> None:
    experts, tokens = layer_of([0] * 8, 5, torch.float32)
    assert not run_persistent(experts, *tokens).any()


def test_tiles_shrink_with_the_pairs_of_an_expert() -> None:
    rows = [ragged_kernel.tile_of(num_pairs, 128)[0] for num_pairs in (256, 8192, 65536)]
    assert rows == [16, 64, 128]
    assert not ragged_kernel.is_served(layer_with_bias())


def layer_with_bias() -> RaggedExperts:
    experts, _ = layer_of([1] * 8, 1, torch.float32)
    experts.layout = experts.layout._replace(has_bias=True)
    return experts


def test_the_operator_says_what_it_returns() -> None:
    """What torch.compile needs: its fake implementation, and that it changes no input."""
    experts, tokens = layer_of(WIDTHS, 5, torch.float32)
    width_E = torch.tensor(WIDTHS, device=DEVICE)
    arguments = (*tokens, experts.gate_up_proj, experts.down_proj, width_E, 128)
    torch.library.opcheck(
        ragged_kernel.ragged_experts, arguments, test_utils=("test_schema", "test_faketensor")
    )
