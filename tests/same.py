"""When two models are the same, on any machine.

Weights are equal bit for bit. What is computed from them is not: a tensor that was mapped from a file lies
elsewhere in memory than one that was made, and some processors then take another kernel, which rounds
otherwise (logits differ by 7e-7 on AMD EPYC).
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

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
