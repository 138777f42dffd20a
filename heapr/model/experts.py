"""The experts' forward under the name "heapr", and an optional observer of what flows through.

`use_heapr_experts` makes transformers call `run_experts` for every experts module, so that one function serves every family,
dense, observed and ragged. `use_comparable_experts` makes a dense and a pruned model round alike, for measuring them side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from heapr.errors import ConfigError
from heapr.model.ragged_experts import (
    ExpertObserver,
    Experts,
    Matrices,
    counts_of,
    is_ragged,
    matrices_of,
    routing_of,
    run_experts,
    run_sorted,
)

IMPLEMENTATION = "heapr"
ALIGNMENT_BYTES = 64  # of memory that torch allocates; what is mapped from a file may lie elsewhere
ExpertsForward = Callable[..., Tensor]  # run_experts, or what stands in for it where there is no data
CAPABILITIES = {  # what an experts module may need that we lack, by attribute of transformers' decorator
    "has_post_expert_norm": "experts with a norm after the down projection: such an expert is not a sum of atomic experts",
}


def is_experts(module: nn.Module) -> bool:
    """Whether a module is a layer's routed experts: ragged, behind transformers' experts interface, or Llama-4's."""
    return is_ragged(module) or _is_behind_interface(module) or _is_outside_interface(module)


@contextmanager
def use_heapr_experts(model: PreTrainedModel, run: ExpertsForward = run_experts) -> Iterator[None]:
    """Select `run` for every experts module of the model; restores the previous forward.

    Raises:
        ConfigError: transformers does not let the model's experts implementation be chosen, which it passes over in silence.
    """
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, run)
    previous = model.get_experts_implementation()
    model.set_experts_implementation(IMPLEMENTATION)
    if IMPLEMENTATION not in model.get_experts_implementation().values() and any(map(_is_behind_interface, model.modules())):
        raise ConfigError(f"{type(model).__name__} needs a missing capability: experts whose implementation cannot be chosen")
    outside = [module for module in model.modules() if _is_outside_interface(module) or (is_ragged(module) and run is not run_experts)]
    try:
        with forwards(outside, lambda experts: partial(run, experts)):
            yield
    finally:
        ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, run_experts)
        model.set_experts_implementation(previous)


@contextmanager
def use_comparable_experts(model: PreTrainedModel) -> Iterator[None]:
    """Experts run so that a difference between two models is one of their weights, never of how they are stored: a plan that keeps
    everything changes no bit of any metric, in any dtype. For measuring quality; it may copy each expert's weights once a batch. Restores.

    Raises:
        ConfigError: see `use_heapr_experts`.
    """
    with use_heapr_experts(model, run_comparable_experts):
        yield


def run_comparable_experts(experts: Experts, hidden_TD: Tensor, *routing: Tensor) -> Tensor:
    """As `run_experts`, with every matrix in the same memory layout whatever the module's: matrix products round differently for a
    matrix and for its transpose in memory, as dense experts hold W_down and as ragged ones do."""
    expert_TK, router_weight_TK = routing_of(experts, hidden_TD, *routing)
    counts = counts_of(experts, expert_TK)
    return run_sorted(experts, hidden_TD, expert_TK, router_weight_TK, counts=counts, matrices_E=map(_in_one_layout, matrices_of(experts)))


@contextmanager
def skip_experts(model: PreTrainedModel) -> Iterator[None]:
    """Routed experts return zeros without computing anything, for counting what the rest of the model does. Restores."""
    with forwards([module for module in model.modules() if is_experts(module)], lambda _: lambda hidden, *__: torch.zeros_like(hidden)):
        yield


@contextmanager
def forwards(modules: Sequence[nn.Module], make: Callable[[nn.Module], Callable[..., Tensor]]) -> Iterator[None]:
    """Give each module a forward of its own; restores what was there, a device map's hook too."""
    previous = [module.__dict__.get("forward") for module in modules]
    for module in modules:
        module.forward = make(module)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module, forward in zip(modules, previous, strict=True):
            del module.forward
            if forward is not None:
                module.forward = forward  # type: ignore[method-assign]


@contextmanager
def observe_experts(
    model: PreTrainedModel, observers: Sequence[tuple[Experts, ExpertObserver]], run: ExpertsForward = run_experts
) -> Iterator[None]:
    """Let each observer see what flows through its experts module; the model's outputs do not change. Restores."""
    with use_heapr_experts(model, run):
        for experts, observer in observers:
            experts.observer = observer
        try:
            yield
        finally:
            for experts, _ in observers:
                experts.observer = None


def _in_one_layout(matrices: Matrices) -> Matrices:
    inputs_GD, inputs_bias_G, down_DF, down_bias_D = matrices
    biases = [None if bias is None else _row_by_row(bias) for bias in (inputs_bias_G, down_bias_D)]
    return Matrices(_row_by_row(inputs_GD), biases[0], _row_by_row(down_DF), biases[1])


def _row_by_row(tensor: Tensor) -> Tensor:
    """The tensor in contiguous, aligned memory; a copy where it is not there already."""
    if tensor.is_contiguous() and tensor.data_ptr() % ALIGNMENT_BYTES == 0:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _is_behind_interface(module: nn.Module) -> bool:
    return hasattr(module, "is_concatenated")  # set by transformers' decorator


def _is_outside_interface(module: nn.Module) -> bool:
    return type(module).__name__ == "Llama4TextExperts"
