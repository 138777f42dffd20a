"""What a pass over the model costs, found on the meta device: the model's own code runs, on shapes alone.

In: a model on the meta device, a number of sequences and their length. Out: FLOPs, and bytes held for the
backward pass. Routing depends on data, so tokens are assumed to spread evenly over the experts; if all
experts have one width, neither number depends on routing.
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
from heapr.model.loss import chunk_size, frozen_parameters, gradient_from_embeddings, summed_loss_backward
from heapr.model.moe import MoEModel, experts_per_token


def calibration_flops(model: MoEModel, length: int) -> int:
    """FLOPs of one sequence's forward pass and its backward pass to the input embeddings.

    A batch of N sequences takes N times as many.

    torch counts them, with attention as plain matrix products, because its fused kernels are not counted on
    every device.

    Raises:
        RuntimeError: the family's layers do not run on the meta device.
    """
    ids_NW = torch.zeros((1, length), dtype=torch.int64, device="meta")
    with (
        _calibrating(model, HeldTensors(model)),
        eager_attention(model),
        FlopCounterMode(display=False) as counter,
    ):
        hidden_NWD = model.hidden_states(input_ids=ids_NW)
        summed_loss_backward(model, hidden_NWD, ids_NW)
    return int(counter.get_total_flops())


def activation_bytes(model: MoEModel, num_sequences: int, length: int) -> int:
    """Bytes that one batch holds between forward and backward.

    This counts distinct tensors that autograd saves or the collector keeps, except parameters, and what one
    chunk of logits adds.

    Attention counts as a fused kernel if the model uses torch's: it saves queries, keys, values, output and
    one float32 per query, never the (W, W) weights. Memory that an operation uses while it runs is not
    counted.

    Raises:
        RuntimeError: the family's layers do not run on the meta device.
    """
    ids_NW = torch.zeros((num_sequences, length), dtype=torch.int64, device="meta")
    held = HeldTensors(model)
    with _calibrating(model, held), FusedAttention(), held:
        hidden_NWD = model.hidden_states(input_ids=ids_NW)
        # One token more than a chunk, because the last one predicts nothing.
        size = chunk_size(model) + 1
        chunk_TD = hidden_NWD.detach().flatten(0, 1)[:size]
        chunk_ids_T = ids_NW.flatten()[:size]
        summed_loss_backward(model, chunk_TD.unsqueeze(0).requires_grad_(), chunk_ids_T.unsqueeze(0))
    return held.num_bytes


@contextmanager
def _calibrating(model: MoEModel, held: HeldTensors) -> Iterator[None]:
    """Inside the context, the model runs as in the collector, on shapes alone."""
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
    """Like `run_experts`, with the same assumed number of tokens for every expert.

    If all experts have one width, the first one stands for all of them, which costs the same.
    """
    expert_TK, router_weight_TK = routing_of(experts, hidden_TD, *routing)
    num_experts, num_rows = int(experts.num_experts), expert_TK.numel()
    num_pairs = num_rows
    if layout_of(experts).weighs_input:
        num_tokens = num_rows // num_experts
        num_pairs = num_tokens * top_k
    if len(set(widths_of(experts))) == 1:
        counts = [num_pairs] + [0] * (num_experts - 1)
    else:
        each, num_larger = divmod(num_pairs, num_experts)
        counts = [each + 1] * num_larger + [each] * (num_experts - num_larger)
    counts.append(num_rows - num_pairs)
    return run_sorted(experts, hidden_TD, expert_TK, router_weight_TK, counts=counts)


class HeldTensors:
    """Counts the memory held for a backward pass; a context manager, and an observer of experts.

    Args:
        model: its parameters are not counted.
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
        """Count what the collector keeps until the gradient arrives (heapr/calibration/collector.py)."""
        for tensor in (h_SF, router_weight_S, output_SD):
            self._pack(tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._parameters:
            self._storages[storage._cdata] = storage  # kept, so that no other storage gets its address
        return tensor


@contextmanager
def eager_attention(model: MoEModel) -> Iterator[None]:
    """Inside the context, attention is plain matrix products; the previous implementation is restored."""
    previous = model.model.config._attn_implementation
    model.model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.model.set_attn_implementation(previous)


class FusedAttention(TorchFunctionMode):
    """Inside the context, attention on the meta device saves what torch's fused kernels save elsewhere."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            query, key, value = args
            return _SavedByFusedAttention.apply(query, key, value, kwargs.get("attn_mask"))
        return func(*args, **kwargs)


class _SavedByFusedAttention(torch.autograd.Function):
    """Shapes and saved tensors of fused attention, without values."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        output = query.new_empty((*query.shape[:-1], value.shape[-1]))
        log_sum_exp = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, mask, output, log_sum_exp)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


class _SingleSequences(TorchDispatchMode):
    """Answers transformers' one question about values, whether a row's positions are one sequence: yes."""

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        is_question = func is torch.ops.aten._local_scalar_dense.default
        if is_question and args[0].dtype == torch.bool and args[0].is_meta:
            return True
        return func(*args, **(kwargs or {}))
