"""Segments reduced at once give what each expert's rows give alone; the collector's own tests hold these to
the definitions."""

from __future__ import annotations

import torch

from heapr.calibration.segments import OneExpert, Segments, pair_statistics
from heapr.types import LayerStatistics

COUNTS = [3, 0, 40, 1, 0]  # experts without tokens, the last one too


def test_segments_give_what_each_expert_gives_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    num_pairs, offsets = sum(COUNTS), torch.tensor([0, *COUNTS]).cumsum(0)
    shapes = [(num_pairs, 6), (num_pairs,), (num_pairs, 5), (num_pairs, 6)]
    rows = [torch.randn(shape, generator=generator) for shape in shapes]
    rows[1] = rows[1].abs()  # router weights
    found = pair_statistics(*rows, Segments(offsets))
    assert found.keys() == dict(LayerStatistics.zeros(1, 1, torch.device("cpu")).items()).keys()
    of_experts = zip(*(tensor.split(COUNTS) for tensor in rows), strict=True)
    for expert, of_expert in enumerate(of_experts):
        for name, value in found.items():
            alone = (
                pair_statistics(*of_expert, OneExpert())[name]
                if COUNTS[expert]
                else torch.zeros_like(value[expert])
            )
            torch.testing.assert_close(value[expert], alone, rtol=1e-5, atol=1e-6)
