"""What a pass over the model costs, found on the meta device: the model's own code runs, on shapes alone.

In: a model on the meta device, sequences and their length. Out: FLOPs, and bytes held for the backward pass.
Routing is data, so tokens are assumed to spread evenly over the experts; with experts of one width both
numbers do not depend on it.
Shape letters: T tokens, D model width, E experts, F atomic experts of an expert, K experts per token, n
tokens of one expert, S = T*K (token, expert) pairs, N sequences, W window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from heapr.model.experts.dispatch import observe_experts
from heapr.model.experts.layout import Experts, layout_of, routing_of, widths_of
from heapr.model.experts.loop import run_sorted
from heapr.model.moe import (
    MoEModel,
    experts_per_token,
    frozen_parameters,
    gradient_from_embeddings,
    summed_loss_backward,
)


def calibration_flops(model: MoEModel, length: int) -> int:
    """FLOPs of one sequence: forward, and backward to the input embeddings. A batch of N sequences takes N
    times as many.

    Counted by torch, attention as plain matrix products (its fused kernels are not counted on every device).

    Raises:
        RuntimeError: the family's layers do not run on the meta device.
    """
    ids_NW = torch.zeros((1, length), dtype=torch.int64, device="meta")
    with (
        _calibrating(model, HeldTensors(model)),
        eager_attention(model),
        FlopCounterMode(display=False) as counter,
    ):
        summed_loss_backward(model, model.hidden_states(input_ids=ids_NW), ids_NW)
    return int(counter.get_total_flops())


def activation_bytes(model: MoEModel, num_sequences: int, length: int) -> int:
    """Bytes that one batch holds between forward and backward: distinct tensors that autograd saves or the
    collector keeps, parameters left out; and those of one chunk of logits.

    Attention counts as a fused kernel if the model runs through torch's: it saves queries, keys, values,
    output and one float32 a query, never the (W, W) weights. Memory that an operation uses while it runs is
    not counted.

    Raises:
        RuntimeError: the family's layers do not run on the meta device.
    """
    ids_NW = torch.zeros((num_sequences, length), dtype=torch.int64, device="meta")
    held = HeldTensors(model)
    with _calibrating(model, held), FusedAttention(), held:
        hidden_NWD = model.hidden_states(input_ids=ids_NW)
        chunk_1TD = hidden_NWD.detach().flatten(0, 1)[: model.chunk_size() + 1].unsqueeze(0).requires_grad_()
        summed_loss_backward(model, chunk_1TD, ids_NW.flatten()[: chunk_1TD.shape[1]].unsqueeze(0))
    return held.num_bytes


@contextmanager
def _calibrating(model: MoEModel, held: HeldTensors) -> Iterator[None]:
    """The model as the collector runs it, on shapes alone."""
    run = partial(run_evenly, experts_per_token(model.model))
    watched = [(layer.experts, held.observe) for layer in model.layers]
    with (
        _SingleSequences(),
        frozen_parameters(model.model),
        gradient_from_embeddings(model.model),
        observe_experts(model.model, watched, run),
    ):
        yield


def run_evenly(top_k: int, experts: Experts, hidden_TD: Tensor, *routing: Tensor) -> Tensor:
    """As `run_experts`, with numbers of tokens per expert that are assumed. If all experts have one width,
    the first one stands for all of them, which comes to the same; else every expert gets as many."""
    expert_TK, router_weight_TK = routing_of(experts, hidden_TD, *routing)
    num_experts, num_rows = int(experts.num_experts), expert_TK.numel()
    num_pairs = num_rows // num_experts * top_k if layout_of(experts).weighs_input else num_rows
    if len(set(widths_of(experts))) == 1:
        counts = [num_pairs] + [0] * (num_experts - 1)
    else:
        counts = [
            num_pairs // num_experts + (expert < num_pairs % num_experts) for expert in range(num_experts)
        ]
    return run_sorted(experts, hidden_TD, expert_TK, router_weight_TK, counts=[*counts, num_rows - num_pairs])


class HeldTensors:
    """Counts the memory that is held for a backward pass: a context manager, and an observer of experts.

    Args:
        model: whose parameters do not count.
    """

    def __init__(self, model: MoEModel) -> None:
        self._parameters = {parameter.untyped_storage()._cdata for parameter in model.model.parameters()}
        self._storages: dict[int, torch.UntypedStorage] = {}
        self._hooks = saved_tensors_hooks(self._pack, lambda tensor: tensor)

    @property
    def num_bytes(self) -> int:
        return sum(storage.nbytes() for storage in self._storages.values())

    def __enter__(self) -> None:
        self._hooks.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    def observe(self, h_SF: Tensor, router_weight_S: Tensor, output_SD: Tensor, offsets: Tensor) -> None:
        """What the collector keeps until the gradient arrives (heapr/calibration/collector.py)."""
        for tensor in (h_SF, router_weight_S, output_SD):
            self._pack(tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._parameters:
            self._storages[storage._cdata] = storage  # kept, so that no other storage gets its address
        return tensor


@contextmanager
def eager_attention(model: MoEModel) -> Iterator[None]:
    """Attention as plain matrix products; restores."""
    previous = model.model.config._attn_implementation
    model.model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.model.set_attn_implementation(previous)


class FusedAttention(TorchFunctionMode):
    """Inside, torch's attention saves on the meta device what its fused kernels save elsewhere."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            query, key, value = args
            return _SavedByFusedAttention.apply(query, key, value, (kwargs or {}).get("attn_mask"))
        return func(*args, **(kwargs or {}))


class _SavedByFusedAttention(torch.autograd.Function):
    """Shapes and saved tensors of fused attention; no values."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        output = query.new_empty((*query.shape[:-1], value.shape[-1]))
        ctx.save_for_backward(
            query, key, value, mask, output, query.new_empty(query.shape[:-1], dtype=torch.float32)
        )
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


class _SingleSequences(TorchDispatchMode):
    """Answers the one question that transformers asks of values: whether a row's positions are those of a
    single sequence. They are."""

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if (
            func is torch.ops.aten._local_scalar_dense.default
            and args[0].dtype == torch.bool
            and args[0].is_meta
        ):
            return True
        return func(*args, **(kwargs or {}))
