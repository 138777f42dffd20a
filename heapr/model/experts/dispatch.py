"""Which forward runs a layer's experts, and who watches: the seam into transformers' experts interface.

Every module has a forward of its own while a context manager below is open, so uses nest, and models do not
share any. Dense experts get it through transformers under the name "heapr", ragged ones directly;
`use_comparable_experts` makes a dense and a pruned model round alike, for measuring them side by side.
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
from heapr.model.experts.layout import (
    ExpertObserver,
    Experts,
    Matrices,
    is_behind_interface,
    is_outside_interface,
    is_ragged,
    matrices_of,
    routing_of,
)
from heapr.model.experts.loop import counts_of, run_experts, run_sorted

IMPLEMENTATION = "heapr"
ALIGNMENT_BYTES = 64  # of memory that torch allocates; what is mapped from a file may lie elsewhere
ExpertsForward = Callable[..., Tensor]  # run_experts, or what stands in for it where there is no data
CAPABILITIES = {  # what an experts module may need that we lack, by attribute of transformers' decorator
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
    return run_experts  # serves all; what is faster somewhere goes here, with its condition


def run_chosen(experts: Experts, hidden_TD: Tensor, *routing: Tensor) -> Tensor:
    """What transformers calls under the name "heapr": the forward that was chosen for this very module."""
    run: ExpertsForward = experts.run
    return run(experts, hidden_TD, *routing)


@contextmanager
def use_heapr_experts(model: PreTrainedModel, run: ExpertsForward | None = None) -> Iterator[None]:
    """Run every experts module of the model by `run`, or by what serves it best; restores the previous
    forward, ours or not.

    Raises:
        ConfigError: transformers does not let the model's experts implementation be chosen, which it passes
            over in silence.
    """
    modules = [module for module in model.modules() if is_experts(module)]
    chosen = [(module, "run", run or forward_for(module)) for module in modules]
    outside = [
        (module, _forward_name(module), partial(run_chosen, module))
        for module in modules
        if is_outside_interface(module)
    ]
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, run_chosen)
    previous = model.get_experts_implementation()
    model.set_experts_implementation(IMPLEMENTATION)
    try:
        if IMPLEMENTATION not in model.get_experts_implementation().values() and any(
            map(is_behind_interface, modules)
        ):
            raise ConfigError(
                f"{type(model).__name__} needs a missing capability: experts whose implementation cannot be"
                " chosen"
            )
        with exchanged(chosen + outside):
            yield
    finally:
        model.set_experts_implementation(previous)


@contextmanager
def observe_experts(
    model: PreTrainedModel,
    observers: Sequence[tuple[Experts, ExpertObserver]],
    run: ExpertsForward | None = None,
) -> Iterator[None]:
    """Let each observer see what flows through its experts module; the model's outputs do not change.
    Restores.

    Args:
        run: see `use_heapr_experts`.
    """
    watched = [(experts, "observer", observer) for experts, observer in observers]
    with use_heapr_experts(model, run), exchanged(watched):
        yield


@contextmanager
def use_comparable_experts(model: PreTrainedModel) -> Iterator[None]:
    """Experts run so that a difference between two models is one of their weights, never of how they are
    stored: a plan that keeps everything changes no bit of any metric, in any dtype. For measuring quality; it
    may copy each expert's weights once a batch. Restores.

    Raises:
        ConfigError: see `use_heapr_experts`.
    """
    with use_heapr_experts(model, run_comparable_experts):
        yield


def run_comparable_experts(experts: Experts, hidden_TD: Tensor, *routing: Tensor) -> Tensor:
    """As `run_experts`, with every matrix in the same memory layout whatever the module's: matrix products
    round differently for a matrix and for its transpose in memory, as dense experts hold W_down and as ragged
    ones do."""
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
    """Routed experts return zeros without computing anything, for counting what the rest of the model does.
    Restores."""
    with use_heapr_experts(model, lambda _, hidden_TD, *__: torch.zeros_like(hidden_TD)):
        yield


@contextmanager
def forwards(modules: Sequence[nn.Module], make: Callable[[nn.Module], Callable[..., Any]]) -> Iterator[None]:
    """Give each module a forward of its own; restores what was there, a device map's hook too."""
    with exchanged([(module, "forward", make(module)) for module in modules]):
        yield


@contextmanager
def exchanged(values: Sequence[tuple[nn.Module, str, Any]]) -> Iterator[None]:
    """Give modules attributes, by name, of their own; restores what each had, or that it had none."""
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
    """Under which name a module keeps its forward: accelerate, of a device map, wraps it in one that brings
    the weights."""
    return "_old_forward" if "_old_forward" in vars(module) else "forward"


def _in_one_layout(matrices: Matrices) -> Matrices:
    inputs_GD, inputs_bias_G, down_DF, down_bias_D = matrices
    biases = [None if bias is None else _row_by_row(bias) for bias in (inputs_bias_G, down_bias_D)]
    return Matrices(_row_by_row(inputs_GD), biases[0], _row_by_row(down_DF), biases[1])


def _row_by_row(tensor: Tensor) -> Tensor:
    """The tensor in contiguous, aligned memory; a copy where it is not there already."""
    if tensor.is_contiguous() and tensor.data_ptr() % ALIGNMENT_BYTES == 0:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)
