"""The Triton kernel of the statistics, in Triton's interpreter where there is no GPU, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from heapr.calibration import kernel
from heapr.calibration.kernel import MAXIMUM, SUMS, tile_statistics
from heapr.calibration.segments import Segments, pair_statistics

pytestmark = pytest.mark.kernel
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COUNTS = [3, 0, 300, 1, 0, 256, 0]  # no rows, more than a tile, exactly one
TAIL = 2  # rows of no expert


def fresh_on_a_gpu(seed: int) -> None:
    """Seeded in the interpreter."""
    if torch.cuda.is_available():
        torch.seed()
    else:
        torch.manual_seed(seed)


def rows_of(counts: list[int], width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """h, dloss/dh, p and offsets. Rows of no expert are poisoned."""
    num_rows = sum(counts) + TAIL
    h_SF, grad_SF = (torch.randn(num_rows, width).to(dtype) for _ in range(2))
    h_SF[sum(counts) :] = grad_SF[sum(counts) :] = float("nan")
    offsets = torch.tensor([0, *counts]).cumsum(0)
    return tuple(tensor.to(DEVICE) for tensor in (h_SF, grad_SF, torch.rand(num_rows).to(dtype), offsets))


def expected_of(h_SF: Tensor, grad_SF: Tensor, p_S: Tensor, counts: list[int]) -> dict[str, Tensor]:
    """The definitions, expert by expert, in float64."""
    found: dict[str, list[Tensor]] = {name: [] for name in (*SUMS, MAXIMUM)}
    parts = [tensor.double().split([*counts, TAIL])[:-1] for tensor in (h_SF, grad_SF, p_S)]
    for h_nF, g_nF, p_n in zip(*parts, strict=True):
        ph_nF = p_n.unsqueeze(1) * h_nF
        values = [h_nF**2, g_nF**2, (g_nF * h_nF) ** 2, g_nF * h_nF, h_nF.abs(), ph_nF**2]
        for name, value_nF in zip(SUMS, values, strict=True):
            found[name].append(value_nF.sum(0))
        largest = ph_nF.abs().amax(0) if len(h_nF) else torch.zeros_like(h_nF.sum(0))
        found[MAXIMUM].append(largest)
    return {name: torch.stack(rows) for name, rows in found.items()}


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the kernel does not write is not a number."""
    new_empty = Tensor.new_empty

    def poisoned(self: Tensor, *size: int, **options: object) -> Tensor:
        empty = new_empty(self, *size, **options)
        return empty.fill_(float("nan")) if empty.is_floating_point() else empty

    monkeypatch.setattr(Tensor, "new_empty", poisoned)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 130), (torch.bfloat16, 24)])
def test_tiles_add_up_to_the_definitions(dtype: torch.dtype, width: int) -> None:
    fresh_on_a_gpu(0)
    h_SF, grad_SF, p_S, offsets = rows_of(COUNTS, width, dtype)
    found = tile_statistics(h_SF, grad_SF, p_S, offsets)
    for name, expected_EF in expected_of(h_SF, grad_SF, p_S, COUNTS).items():
        assert found[name].dtype == torch.float64 and found[name].shape == expected_EF.shape
        assert (found[name] - expected_EF).norm() <= 1e-5 * expected_EF.norm(), name
        assert not found[name][torch.tensor(COUNTS) == 0].any(), name


def test_without_triton_the_result_is_the_same() -> None:
    fresh_on_a_gpu(1)
    h_SF, grad_SF, p_S, offsets = rows_of(COUNTS, 24, torch.bfloat16)
    there = slice(0, sum(COUNTS))
    found = tile_statistics(h_SF, grad_SF, p_S, offsets)
    expected = pair_statistics(h_SF[there], p_S[there], h_SF[there], grad_SF[there], Segments(offsets))
    for name in (*SUMS, MAXIMUM):
        torch.testing.assert_close(found[name].float(), expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("counts", [COUNTS, [0, 0], [1], [256, 256]])
def test_every_row_is_in_one_tile_of_its_expert(counts: list[int]) -> None:
    offsets = torch.tensor([0, *counts]).cumsum(0)
    num_tiles = -(-(sum(counts) + TAIL) // kernel.TILE_ROWS) + len(counts)
    tile_offsets = kernel._tile_offsets(offsets)
    bounds = kernel._tile_bounds(offsets, tile_offsets, num_tiles).tolist()
    rows = [row for first, stop in bounds for row in range(first, stop)]
    assert rows == list(range(sum(counts)))
    assert all(stop - first <= kernel.TILE_ROWS for first, stop in bounds)
    owners = tile_offsets.tolist()
    for expert in range(len(counts)):
        own = bounds[owners[expert] : owners[expert + 1]]
        assert sum(stop - first for first, stop in own) == counts[expert]
