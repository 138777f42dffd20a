"""Whether decoder layers can be run apart from each other: on a few tokens, each layer by itself is compared
with one plain pass.

In: a model. Out: nothing, or the refusal of a model whose layers hand something on in a way that the tape
does not see.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from heapr.errors import ConfigError
from heapr.model.experts.dispatch import use_heapr_experts
from heapr.model.experts.layout import Experts
from heapr.model.experts.loop import run_experts
from heapr.model.moe import MoEModel, frozen_parameters, gradient_from_embeddings, summed_loss_backward
from heapr.model.passes import span_backward
from heapr.model.span import probe_tokens, run_span
from heapr.model.tape import Output, Tape, hidden_of

# Of two batches of few tokens; ids before are often special, and padding may embed as zero.
FIRST_TOKENS = (
    8,
    16,
)
Inputs = dict[nn.Module, list[Tensor]]  # what flows into experts modules: hidden states and router weights


def check_walk(model: MoEModel, *, needed_by: str, instead: str, gradients: bool = False) -> None:
    """Refuse models whose layers, run one by one, do not give what they give in one pass: hidden states
    behind every decoder layer and inputs of all experts. Two batches take turns, as in a walk, so that a
    layer that keeps something for the next one is found too.

    Args:
        needed_by: the option that runs layers one by one; for the message, like
        instead: the option to give instead.
        gradients: the gradients of the loss at what every layer puts out must be the same too.

    Raises:
        ConfigError: naming the layer and what differs.
    """
    with ExitStack() as stack:
        stack.enter_context(frozen_parameters(model.model))
        stack.enter_context(gradient_from_embeddings(model.model) if gradients else torch.no_grad())
        passes = [_Pass(model, probe_tokens(model, first)) for first in FIRST_TOKENS]
        fault = next(filter(None, _faults(model, passes, gradients)), None)
    if fault is not None:
        raise ConfigError(
            f"{needed_by}: {type(model.model).__name__} cannot be run layer by layer: {fault}, so earlier"
            f" layers hand on more than they put out; give {instead}"
        )


def _faults(model: MoEModel, passes: Sequence[_Pass], gradients: bool) -> Iterator[str | None]:
    """What differs, layer after layer."""
    for layer in range(len(model.decoder_layers)):
        for one in passes:
            yield one.fault_forwards(layer)
    if gradients:
        for one in passes:
            yield one.fault_backwards()


class _Pass:
    """One plain pass of a batch through a model, and its tape, which goes layer by layer."""

    def __init__(self, model: MoEModel, ids_NW: Tensor) -> None:
        self.model, self.tape = model, Tape(ids_NW)
        self.embedded: list[Tensor] = []
        self.outputs: list[Output] = []
        self.inputs: Inputs = {}
        with ExitStack() as stack:
            stack.enter_context(use_heapr_experts(model.model, partial(_record, self.inputs)))
            stack.enter_context(_embedded_tokens(model, self.embedded))
            for layer in model.decoder_layers:
                hook = layer.register_forward_hook(lambda _, __, output: self.outputs.append(output))
                stack.callback(hook.remove)
            final = model.hidden_states(input_ids=ids_NW)
        if torch.is_grad_enabled():
            for output in self.outputs:
                hidden_of(output).retain_grad()
            summed_loss_backward(model, final, ids_NW)

    def fault_forwards(self, layer: int) -> str | None:
        """Run the next layer onto the tape; what differs, if anything."""
        inputs: Inputs = {}
        answers = self.tape.answers(layer)
        try:
            with torch.no_grad(), use_heapr_experts(self.model.model, partial(_record, inputs)):
                outputs = run_span(self.model, self.tape.ids_NW, range(layer, layer + 1), answers)
        except Exception as error:  # whatever it is, the plain pass did not raise it
            return f"layer {layer} by itself raises {type(error).__name__}"
        self.tape.put(outputs)
        for experts, tensors in inputs.items():
            if any(map(_differs, tensors, self.inputs[experts])):
                return f"layer {layer} by itself gives its experts something else"
        differs = _differs(hidden_of(outputs[0]), hidden_of(self.outputs[layer]))
        return f"layer {layer} by itself puts out something else" if differs else None

    def fault_backwards(self) -> str | None:
        """Send the loss back layer by layer; what differs, if anything."""
        embedded: list[Tensor] = []
        with use_heapr_experts(self.model.model), _embedded_tokens(self.model, embedded):
            for layer in reversed(range(len(self.outputs))):
                span_backward(self.model, self.tape, range(layer, layer + 1))
                before = layer - 1
                if layer > 0 and _differs(self.tape.gradient(before), hidden_of(self.outputs[before]).grad):
                    return f"the gradient behind layer {before} is another"
        differs = _differs(_summed_gradients(embedded), _summed_gradients(self.embedded))
        return "the gradient before layer 0 is another" if differs else None


@contextmanager
def _embedded_tokens(model: MoEModel, embedded: list[Tensor]) -> Iterator[None]:
    """Collects what the model's layers start from."""
    embeddings = model.model.get_input_embeddings()
    handle = embeddings.register_forward_hook(lambda _, __, output: embedded.append(output))
    try:
        yield
    finally:
        handle.remove()


def _summed_gradients(tensors: Sequence[Tensor]) -> Tensor | None:
    grads = [tensor.grad for tensor in tensors if tensor.grad is not None]
    return torch.stack(grads).sum(0) if grads else None


def _record(inputs: Inputs, experts: Experts, hidden_TD: Tensor, *routing: Tensor) -> Tensor:
    inputs[experts] = [tensor.detach() for tensor in (hidden_TD, *routing) if tensor.is_floating_point()]
    return run_experts(experts, hidden_TD, *routing)


def _differs(found: Tensor | None, expected: Tensor | None) -> bool:
    """By more than rounding of the largest value. What is not finite in the plain pass either is left to
    calibration."""
    if found is None or expected is None or found.shape != expected.shape:
        return found is not expected
    tolerance = max(1e-4, 4 * torch.finfo(expected.dtype).eps) * expected.abs().max()
    difference = (found - expected).abs().max()
    return bool(expected.isfinite().all()) and not bool(difference <= tolerance)
