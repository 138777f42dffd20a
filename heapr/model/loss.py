"""The next-token loss of a model, chunk by chunk, and what its backward pass needs.

In: a model, final hidden states and token ids. Out: losses, or gradients that went back through the hidden
states. The logits of all tokens are never in memory at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from heapr.model.moe import MoEModel

LOGITS_CHUNK = 2**26  # logits held at once: 2^26 elements are 256 MiB in float32


def chunk_size(model: MoEModel) -> int:
    """Number of tokens whose logits are held at once."""
    vocabulary_size: int = model.model.get_output_embeddings().weight.shape[0]
    return max(1, LOGITS_CHUNK // vocabulary_size)


def next_token_loss(model: MoEModel, hidden: Tensor, labels_NW: Tensor) -> Tensor:
    """Cross-entropy in nats of every predicted token, float32 (N, W-1); 0 for the others.

    Holds the logits of one chunk at a time.

    Args:
        hidden: final hidden states.
        labels_NW: token ids, or see `Batch`.
    """
    hidden_TD, target_T = hidden[:, :-1].flatten(0, 1), labels_NW[:, 1:].flatten()
    size = chunk_size(model)
    losses = []
    for chunk, target in zip(hidden_TD.split(size), target_T.split(size), strict=True):
        losses.append(F.cross_entropy(model.logits(chunk), target, reduction="none"))
    return torch.cat(losses).view(labels_NW.shape[0], -1)


def summed_loss_backward(model: MoEModel, hidden: Tensor, labels_NW: Tensor) -> Tensor:
    """Sum the next-token losses and send the gradient back through `hidden`.

    Holds the logits of one chunk at a time. The arguments are those of `next_token_loss`.

    Returns:
        the summed loss in nats, a detached float32 scalar.
    """
    hidden_TD, target_T = hidden.detach()[:, :-1].flatten(0, 1), labels_NW[:, 1:].flatten()
    size = chunk_size(model)
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    grads = []
    for chunk, target in zip(hidden_TD.split(size), target_T.split(size), strict=True):
        leaf = chunk.detach().requires_grad_()
        loss = F.cross_entropy(model.logits(leaf), target, reduction="sum")
        grads += torch.autograd.grad(loss, leaf)
        total += loss.detach()
    grad_hidden = torch.zeros_like(hidden)
    grad_hidden[:, :-1] = torch.cat(grads).view_as(grad_hidden[:, :-1])
    hidden.backward(grad_hidden)
    return total


@contextmanager
def frozen_parameters(model: nn.Module) -> Iterator[None]:
    """Inside the context, no parameter requires a gradient; previous settings are restored."""
    needed = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in needed:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, requires_grad in needed:
            parameter.requires_grad_(requires_grad)


@contextmanager
def gradient_from_embeddings(model: PreTrainedModel) -> Iterator[None]:
    """Inside the context, embedded tokens require a gradient.

    The backward pass needs a leaf when all parameters are frozen. The model still gets token ids, because
    some families route by them.
    """
    handle = model.get_input_embeddings().register_forward_hook(
        lambda _, __, embedded: embedded.detach().requires_grad_()
    )
    try:
        yield
    finally:
        handle.remove()
