"""When two models are the same, on any machine.

Weights are equal bit for bit. What is computed from them is not: a tensor that was mapped from a file lies
elsewhere in memory than one that was made, and some processors then take another kernel, which rounds
otherwise (logits differ by 7e-7 on AMD EPYC).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from heapr.types import Statistics

ROUNDING = {"rtol": 1e-5, "atol": 2e-6}


def logits(model: PreTrainedModel, ids_NW: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids_NW, use_cache=False).logits


def assert_same_model(model: PreTrainedModel, expected: PreTrainedModel, ids_NW: Tensor) -> None:
    """Equal weights under equal names, and logits that differ by rounding alone."""
    tensors, expected_tensors = model.state_dict(), expected.state_dict()
    assert tensors.keys() == expected_tensors.keys()
    different = [name for name, tensor in tensors.items() if not torch.equal(tensor, expected_tensors[name])]
    assert not different
    torch.testing.assert_close(logits(model, ids_NW), logits(expected, ids_NW), **ROUNDING)


def assert_same_statistics(a: Statistics, b: Statistics, tolerance: float = 1e-5) -> None:
    assert a.layers.keys() == b.layers.keys()
    assert (a.num_tokens, a.num_predicted_tokens) == (b.num_tokens, b.num_predicted_tokens)
    assert a.loss_sum == pytest.approx(b.loss_sum, rel=tolerance)
    for index in a.layers:
        for name, tensor in a.layers[index].items():
            other = getattr(b.layers[index], name)
            # a signed sum may cancel, so it is compared on the scale of what was summed
            atol = tolerance * float(other.abs().max()) if name == "gh_sum_EF" else 0.0
            torch.testing.assert_close(
                tensor, other, rtol=tolerance, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
            )


def assert_same_files(folder: Path, expected: Path) -> None:
    """The same names, and the same bytes in each."""
    found, wanted = (
        {path.relative_to(place): path.read_bytes() for path in place.rglob("*") if path.is_file()}
        for place in (folder, expected)
    )
    assert found.keys() == wanted.keys()
    assert [name for name, content in found.items() if content != wanted[name]] == []
