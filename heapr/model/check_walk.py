"""Whether decoder layers can be run one at a time.

On a few tokens, each layer run alone is compared with the same layer in one plain pass.

In: a model. Out: nothing, or a ConfigError for a model whose layers pass something on outside their outputs,
where the tape does not see it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from heapr.errors import ConfigError
from heapr.files import write_json
from heapr.model.experts.dispatch import use_heapr_experts
from heapr.model.experts.grouped import run_fastest
from heapr.model.experts.layout import Experts
from heapr.model.loss import frozen_parameters, gradient_from_embeddings, summed_loss_backward
from heapr.model.moe import MoEModel
from heapr.model.passes import span_backward
from heapr.model.span import probe_tokens, reads_of, run_span
from heapr.model.tape import Output, Tape, hidden_of

# First token ids of the two probe batches. Lower ids are often special, and padding may embed as zero.
FIRST_TOKENS = (8, 16)
Inputs = dict[nn.Module, list[Tensor]]  # what flows into experts modules: hidden states and router weights


def check_walk(model: MoEModel, *, needed_by: str, instead: str, gradients: bool = False) -> None:
    """Refuse models whose layers, run one at a time, differ from one plain pass.

    The comparison covers the hidden states behind every decoder layer and the inputs of all experts. Two
    batches take turns, as in a walk, so that a layer that keeps something for the next one is found too.

    Args:
        needed_by: the option that runs layers one at a time, for the message.
        instead: the option to use instead, for the message.
        gradients: also compare the gradients of the loss with respect to every layer's output.

    Raises:
        ConfigError: a layer differs; the message names it and says how.
    """
    with ExitStack() as stack:
        stack.enter_context(frozen_parameters(model.model))
        stack.enter_context(gradient_from_embeddings(model.model) if gradients else torch.no_grad())
        passes = [_Pass(model, probe_tokens(model, first)) for first in FIRST_TOKENS]
        fault = _first_fault(model, passes, gradients)
    if fault is not None:
        raise ConfigError(
            f"{needed_by}: {type(model.model).__name__} cannot be run layer by layer: {fault}, so its layers"
            f" share more than their outputs; give {instead}"
        )


def check_streamed(model: MoEModel, remembered: Path) -> None:
    """Refuse models that cannot be streamed, and find out which outputs each layer reads.

    It takes reading the model five times, so the result is remembered. Gradients are not compared with those
    of a plain pass, which would need the whole model in memory.

    Args:
        model: streamed.
        remembered: file for the result; it belongs to this model alone.

    Raises:
        ConfigError: naming the layer and what differs.
    """
    if not remembered.is_file():
        check_walk(model, needed_by="runtime.stream=true", instead="runtime.stream=false")
        model.check_head()
        reads_of(model)
        remembered.parent.mkdir(parents=True, exist_ok=True)
        write_json(remembered, {"reads": model.reads})
    model.reads = json.loads(remembered.read_text(encoding="utf-8"))["reads"]


def _first_fault(model: MoEModel, passes: Sequence[_Pass], gradients: bool) -> str | None:
    """The first difference, layer after layer; None if there is none."""
    for layer in range(len(model.decoder_layers)):
        with model.hold([layer]):
            faults = [one_pass.forward_fault(layer) for one_pass in passes]
        fault = next(filter(None, faults), None)
        if fault is not None:
            return fault
    if not gradients:
        return None
    for one_pass in passes:
        fault = one_pass.backward_fault()
        if fault is not None:
            return fault
    return None


class _Pass:
    """One plain pass of a batch through a model, and the tape of the same batch run layer by layer.

    Args:
        ids_NW: the batch's token ids.
    """

    def __init__(self, model: MoEModel, ids_NW: Tensor) -> None:
        self.model = model
        self.tape = Tape(ids_NW)
        self.embedded: list[Tensor] = []
        self.outputs: list[Output] = []
        self.inputs: Inputs = {}

        def keep_output(_: nn.Module, __: object, output: Output) -> None:
            self.outputs.append(output)

        with ExitStack() as stack:
            stack.enter_context(use_heapr_experts(model.model, partial(_record, self.inputs)))
            stack.enter_context(_embedded_tokens(model, self.embedded))
            for layer in model.decoder_layers:
                hook = layer.register_forward_hook(keep_output)
                stack.callback(hook.remove)
            final = model.hidden_states(input_ids=ids_NW)
        if torch.is_grad_enabled():
            for output in self.outputs:
                hidden_of(output).retain_grad()
            summed_loss_backward(model, final, ids_NW)

    def forward_fault(self, layer: int) -> str | None:
        """Run the next layer onto the tape; returns what differs from the plain pass, if anything."""
        inputs: Inputs = {}
        answers = self.tape.answers(layer)
        try:
            with torch.no_grad(), use_heapr_experts(self.model.model, partial(_record, inputs)):
                outputs = run_span(self.model, self.tape.ids_NW, range(layer, layer + 1), answers)
        # Whatever it is, the plain pass did not raise it.
        except Exception as error:
            return f"layer {layer} run alone raises {type(error).__name__}"
        self.tape.put(outputs)
        for experts, tensors in inputs.items():
            if any(map(_differs, tensors, self.inputs[experts])):
                return f"layer {layer} run alone gives its experts different inputs"
        if _differs(hidden_of(outputs[0]), hidden_of(self.outputs[layer])):
            return f"layer {layer} run alone gives a different output"
        return None

    def backward_fault(self) -> str | None:
        """Send the loss back layer by layer; returns what differs from the plain pass, if anything."""
        embedded: list[Tensor] = []
        reads = reads_of(self.model)
        with use_heapr_experts(self.model.model), _embedded_tokens(self.model, embedded):
            for layer in reversed(range(len(self.outputs))):
                span_backward(self.model, self.tape, range(layer, layer + 1), reads)
                if layer == 0:
                    break
                expected = hidden_of(self.outputs[layer - 1]).grad
                if _differs(self.tape.gradient(layer - 1), expected):
                    return f"the gradient behind layer {layer - 1} differs"
        if _differs(_summed_gradients(embedded), _summed_gradients(self.embedded)):
            return "the gradient before layer 0 differs"
        return None


@contextmanager
def _embedded_tokens(model: MoEModel, embedded: list[Tensor]) -> Iterator[None]:
    """Inside the context, append the embedded tokens, from which the first layer starts, to a list."""
    embeddings = model.model.get_input_embeddings()
    handle = embeddings.register_forward_hook(lambda _, __, output: embedded.append(output))
    try:
        yield
    finally:
        handle.remove()


def _summed_gradients(tensors: Sequence[Tensor]) -> Tensor | None:
    """The sum of the tensors' gradients; None if no tensor has one."""
    grads = [tensor.grad for tensor in tensors if tensor.grad is not None]
    return torch.stack(grads).sum(0) if grads else None


def _record(inputs: Inputs, experts: Experts, hidden_TD: Tensor, *routing: Tensor) -> Tensor:
    """Run the experts and record their floating-point inputs."""
    tensors = (hidden_TD, *routing)
    inputs[experts] = [tensor.detach() for tensor in tensors if tensor.is_floating_point()]
    return run_fastest(experts, hidden_TD, *routing)


def _differs(found: Tensor | None, expected: Tensor | None) -> bool:
    """Whether two tensors differ by more than rounding of the largest value.

    Values that are not finite in the plain pass either are left to calibration.
    """
    if found is None or expected is None or found.shape != expected.shape:
        return found is not expected
    relative_tolerance = max(1e-4, 4 * torch.finfo(expected.dtype).eps)
    tolerance = relative_tolerance * expected.abs().max()
    difference = (found - expected).abs().max()
    is_close = bool(difference <= tolerance)
    return not is_close and bool(expected.isfinite().all())
