"""Surgery: apply a plan to a model. Either really remove rows and columns, or set them to zero.

In: a dense model and a plan. Out: the same model, changed in place, one layer at a time.
Shape letters: D model width, E experts, F atomic experts of an expert.
"""

from __future__ import annotations

import torch
from torch import Tensor

from heapr.model.experts import RaggedExperts
from heapr.model.moe import MoELayer, MoEModel
from heapr.types import Plan


@torch.no_grad()
def remove(model: MoEModel, plan: Plan) -> None:
    """Remove rows of W_gate and W_up and columns of W_down (docs/method.md, 1): experts become ragged.

    A layer that keeps everything is left as it is. Each dense layer is freed before the next one is cut.
    """
    for layer in model.layers:
        kept_EF = _kept(layer, plan)
        if not kept_EF.all():
            layer.replace_experts(_ragged(layer, kept_EF))


@torch.no_grad()
def mask(model: MoEModel, plan: Plan) -> None:
    """Set the columns of W_down of removed atomic experts to zero: the same function in the dense shape."""
    for layer in model.layers:
        kept_EF = _kept(layer, plan)
        layer.experts.down_proj *= kept_EF.unsqueeze(1).to(layer.experts.down_proj)


def _kept(layer: MoELayer, plan: Plan) -> Tensor:
    kept_EF = plan.layers[layer.index]
    assert kept_EF.shape == (layer.num_experts, layer.width), (layer.index, kept_EF.shape)
    return kept_EF


def _ragged(layer: MoELayer, kept_EF: Tensor) -> RaggedExperts:
    """Packed rows of the kept atomic experts; see `RaggedExperts` for the layout."""
    weights = layer.weights()
    gate_up, down = [], []
    for expert, kept_F in enumerate(kept_EF.to(weights.gate_EFD.device)):
        gate_up += [weights.gate_EFD[expert, kept_F], weights.up_EFD[expert, kept_F]]
        down.append(weights.down_EDF[expert, :, kept_F].T)
    return RaggedExperts(
        torch.cat(gate_up),
        torch.cat(down).contiguous(),
        widths=kept_EF.sum(dim=1).tolist(),
        act_fn=layer.experts.act_fn,
    )
