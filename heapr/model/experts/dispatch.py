"""Which forward runs a layer's experts, and who observes it: the link to transformers' experts interface.

Inside a context manager below, each module has its own forward, so uses nest and models share nothing.
Dense experts get it through transformers under the name "heapr", ragged ones directly.
`use_comparable_experts` makes a dense and a pruned model round alike, to compare them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from heapr.errors import ConfigError
from heapr.model.experts.grouped import is_grouped, run_fastest, run_grouped
from heapr.model.experts.layout import (
    ExpertObserver,
    Experts,
    Matrices,
    is_behind_interface,
    is_outside_interface,
    is_ragged,
    layout_of,
    matrices_of,
    routing_of,
)
from heapr.model.experts.loop import counts_of, run_sorted

IMPLEMENTATION = "heapr"
ALIGNMENT_BYTES = 64  # of memory that torch allocates; memory mapped from a file may be aligned otherwise
ExpertsForward = Callable[..., Tensor]  # run_fastest, or a replacement where there is no data
# What an experts module may need that heapr lacks, by attribute of transformers' decorator.
CAPABILITIES = {
    "has_post_expert_norm": (
        "experts with a norm after the down projection: such an expert is not a sum of atomic experts"
    ),
}
ABSENT = object()


def is_experts(module: nn.Module) -> bool:
    """Whether a module is a layer's routed experts."""
    return is_ragged(module) or is_behind_interface(module) or is_outside_interface(module)


def forward_for(experts: Experts) -> ExpertsForward:
    """The forward that serves a module's layout, device and dtype."""
    assert is_experts(experts)
    return run_fastest  # asks, at each call, what serves these weights and this input


def run_chosen(experts: Experts, hidden_TD: Tensor, *routing: Tensor) -> Tensor:
    """Run the forward chosen for this module; transformers calls this under the name "heapr"."""
    run: ExpertsForward = experts.run
    return run(experts, hidden_TD, *routing)


@contextmanager
def use_heapr_experts(model: PreTrainedModel, run: ExpertsForward | None = None) -> Iterator[None]:
    """Inside the context, run every experts module of the model with `run`, or with its `forward_for`.

    The previous forward is restored, whether it was ours or not.

    Raises:
        ConfigError: the experts implementation of the model cannot be chosen. transformers ignores the choice
            silently.
    """
    modules = [module for module in model.modules() if is_experts(module)]
    values: list[tuple[nn.Module, str, Any]] = []
    for module in modules:
        values.append((module, "run", run or forward_for(module)))
        if is_ragged(module):  # copies of its weights made inside are freed at the end
            values.append((module, "packed", module.packed))
        if is_outside_interface(module):
            values.append((module, _forward_name(module), partial(run_chosen, module)))
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, run_chosen)
    previous = model.get_experts_implementation()
    model.set_experts_implementation(IMPLEMENTATION)
    try:
        is_chosen = IMPLEMENTATION in model.get_experts_implementation().values()
        if not is_chosen and any(map(is_behind_interface, modules)):
            raise ConfigError(
                f"{type(model).__name__} needs a missing capability: experts whose implementation cannot be"
                " chosen"
            )
        with exchanged(values):
            yield
    finally:
        model.set_experts_implementation(previous)


@contextmanager
def observe_experts(
    model: PreTrainedModel,
    observers: Sequence[tuple[Experts, ExpertObserver]],
    run: ExpertsForward | None = None,
) -> Iterator[None]:
    """Inside the context, call each observer with what flows through its experts module.

    The model's outputs do not change.

    Args:
        run: see `use_heapr_experts`.
    """
    watched = [(experts, "observer", observer) for experts, observer in observers]
    with use_heapr_experts(model, run), exchanged(watched):
        yield


@contextmanager
def use_comparable_experts(model: PreTrainedModel) -> Iterator[None]:
    """Inside the context, two models differ only if their weights do, however these are stored.

    A plan that keeps everything thus changes no bit of any metric, in any dtype. Use it to measure quality;
    it may copy each expert's weights once per batch.

    Raises:
        ConfigError: see `use_heapr_experts`.
    """
    with use_heapr_experts(model, run_comparable_experts):
        yield


def run_comparable_experts(experts: Experts, hidden_TD: Tensor, *routing: Tensor) -> Tensor:
    """Like `run_fastest`, with every matrix in the same memory layout.

    Dense and ragged experts store W_down transposed to each other, and matrix products round differently for
    the two. The grouped forward packs ragged experts as dense ones that are not transposed are stored.
    """
    is_on_gpu = hidden_TD.device.type == "cuda"
    if is_on_gpu and not layout_of(experts).is_transposed and is_grouped(experts, hidden_TD):
        return run_grouped(experts, hidden_TD, *routing)
    expert_TK, router_weight_TK = routing_of(experts, hidden_TD, *routing)
    counts = counts_of(experts, expert_TK)
    return run_sorted(
        experts,
        hidden_TD,
        expert_TK,
        router_weight_TK,
        counts=counts,
        matrices_E=map(_in_one_layout, matrices_of(experts)),
    )


@contextmanager
def skip_experts(model: PreTrainedModel) -> Iterator[None]:
    """Inside the context, routed experts return zeros and compute nothing: only the rest has a cost."""
    with use_heapr_experts(model, lambda _, hidden_TD, *__: torch.zeros_like(hidden_TD)):
        yield


@contextmanager
def forwards(modules: Sequence[nn.Module], make: Callable[[nn.Module], Callable[..., Any]]) -> Iterator[None]:
    """Inside the context, give each module its own forward; a device map's hook is restored too."""
    replaced = [(module, "forward", make(module)) for module in modules]
    with exchanged(replaced):
        yield


@contextmanager
def exchanged(values: Sequence[tuple[nn.Module, str, Any]]) -> Iterator[None]:
    """Inside the context, set attributes of modules, given as (module, name, value).

    Previous values are restored, and attributes that did not exist are deleted.
    """
    previous = [(module, name, vars(module).get(name, ABSENT)) for module, name, _ in values]
    for module, name, value in values:
        setattr(module, name, value)
    try:
        yield
    finally:
        for module, name, value in previous:
            if value is ABSENT:
                delattr(module, name)
            else:
                setattr(module, name, value)


def _forward_name(module: nn.Module) -> str:
    """The attribute that holds a module's own forward.

    With a device map, accelerate wraps it in one that fetches the weights.
    """
    return "_old_forward" if "_old_forward" in vars(module) else "forward"


def _in_one_layout(matrices: Matrices) -> Matrices:
    copies = [None if tensor is None else _row_by_row(tensor) for tensor in matrices]
    return Matrices._make(copies)


def _row_by_row(tensor: Tensor) -> Tensor:
    """The tensor in contiguous, aligned memory; a copy unless it already is."""
    if tensor.is_contiguous() and tensor.data_ptr() % ALIGNMENT_BYTES == 0:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)
