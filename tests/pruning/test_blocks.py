"""Blocks solved many at once are solved as each would be alone, whatever their widths are rounded up to."""

from __future__ import annotations

import pytest
import torch

from heapr.errors import ConfigError
from heapr.model.device import exact_products
from heapr.pruning import blocks
from heapr.pruning.blocks import BlockFactors

WIDTHS = [5, 0, 3, 5, 64, 65]


@pytest.mark.parametrize("step", [1, 64])
def test_blocks_are_solved_as_each_alone(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounded up to multiples of 64 as on a GPU, and not."""
    monkeypatch.setattr(blocks, "width_buckets", lambda widths, _: real_buckets(widths, step))
    generator = torch.Generator().manual_seed(0)
    factors = BlockFactors(WIDTHS, torch.device("cpu"))
    factors._at_once = step
    moments = []
    for expert, width in enumerate(WIDTHS):
        z_nS = torch.randn(40, width, generator=generator)
        moments.append(z_nS.T @ z_nS)
        factors.set_block(expert, moments[-1])
    assert torch.equal(factors.diagonal(), torch.cat([C_SS.diagonal() for C_SS in moments]).double())
    factors.factor(0.5)
    right_SD = torch.randn(sum(WIDTHS), 7, generator=generator).double()
    expected = []
    for C_SS, rows_SD in zip(moments, right_SD.split(WIDTHS), strict=True):
        regular_SS = C_SS.double() + 0.5 * torch.eye(len(C_SS))
        expected.append(torch.linalg.solve(regular_SS, rows_SD))
    torch.testing.assert_close(factors.solve(right_SD), torch.cat(expected), rtol=1e-9, atol=1e-9)


real_buckets = blocks.width_buckets


def test_one_singular_block_is_refused() -> None:
    factors = BlockFactors([2, 2], torch.device("cpu"))
    factors.set_block(0, torch.eye(2))
    factors.set_block(1, torch.tensor([[1.0, 2.0], [2.0, 1.0]]))
    with pytest.raises(ConfigError, match="ridge is too small"):
        factors.factor(1e-3)


def test_products_are_exact_inside_and_as_before_outside() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        with exact_products():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
