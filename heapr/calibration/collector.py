"""The collector: watches every routed expert during one forward and backward pass and keeps running sums.

In: a model and its batches of token ids. Out: `Statistics` (docs/method.md). The identity that makes one pass
enough (docs/method.md, 5): E(x) = W_down h(x), so dloss/dh_k = w_k . g, and the D x D matrices of the
published procedure are never needed.
Shape letters: D model width, E experts, F atomic experts of an expert, S (token, expert) pairs sorted by
expert, n tokens of one expert, N sequences, W window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor

from heapr.calibration.segments import OneExpert, Segments, pair_statistics
from heapr.model.experts.dispatch import observe_experts
from heapr.model.experts.loop import split_by_expert
from heapr.model.moe import MoELayer, MoEModel, frozen_parameters, gradient_from_embeddings
from heapr.model.passes import backward_by_spans
from heapr.model.span import Span
from heapr.types import MAXIMA, LayerStatistics, Statistics


class LayerObserver:
    """Running sums of one layer, updated once for each batch, when the gradient of its activations arrives.

    Args:
        layer: what is observed; the sums are kept on its device.
    """

    def __init__(self, layer: MoELayer) -> None:
        self.index, self.widths = layer.index, layer.widths
        zeros = LayerStatistics.zeros(layer.num_experts, layer.width, layer.experts.down_proj.device)
        self.sums = dict(zeros.items())

    def statistics(self) -> LayerStatistics:
        return LayerStatistics(**self.sums)

    def __call__(self, h_SF: Tensor, router_weight_S: Tensor, output_SD: Tensor, offsets: Tensor) -> None:
        if h_SF.requires_grad:
            seen = (h_SF.detach(), router_weight_S.detach(), output_SD.detach())
            h_SF.register_hook(partial(self._add, offsets, seen))

    @torch.no_grad()
    def _add(self, offsets: Tensor, seen: tuple[Tensor, Tensor, Tensor], grad_SF: Tensor) -> None:
        """Add one batch. Its own sums are taken in float32, sums over batches in float64."""
        if not offsets.is_cpu:
            self._add_to(slice(None), slice(None), pair_statistics(*seen, grad_SF, Segments(offsets)))
            return
        of_experts = [split_by_expert(rows, offsets) for rows in (*seen, grad_SF)]
        # One's rows stay in the CPU's cache.
        for expert, (h_nF, p_n, output_nD, grad_nF) in enumerate(zip(*of_experts, strict=True)):
            own = slice(self.widths[expert])
            if len(p_n):
                self._add_to(
                    expert, own, pair_statistics(h_nF[:, own], p_n, output_nD, grad_nF[:, own], OneExpert())
                )

    def _add_to(self, experts: int | slice, atomic: slice, found: dict[str, Tensor]) -> None:
        for name, value in found.items():
            where = (experts, atomic) if name.endswith("_EF") else experts
            if name in MAXIMA:
                self.sums[name][where] = torch.maximum(self.sums[name][where], value.double())
            else:
                self.sums[name][where] += value


def collect(
    model: MoEModel,
    batches: Iterable[Tensor],
    *,
    spans: Sequence[Span] | None = None,
    on_batch: Callable[[int, float], None] = lambda num_tokens, loss: None,
) -> Statistics:
    """Statistics of the batches: one forward and one backward each, parameters frozen, gradient from the
    input embeddings.

    The loss is the *sum* of next-token cross-entropies, so how sequences are batched changes the statistics
    by rounding alone (about 1e-6 in float32, docs/method.md); router auxiliary losses play no part. Several
    spans need the memory of one span at a time and give the same statistics, in some families up to rounding
    (`backward_by_spans`).

    Args:
        model: dense or pruned; for several spans one that passes `check_walk`.
        batches: int64 (N, W) token ids each.
        spans: of decoder layers, one behind the other from the first layer to the last; None is one span.
        on_batch: told, after each batch has reached the loss, the number of tokens so far and their mean
            loss, in nats per predicted token.

    Raises:
        FloatingPointError: a loss or statistic is NaN or infinite; the message names layer and batch.
    """
    spans = [range(len(model.decoder_layers))] if spans is None else spans
    observers = [LayerObserver(layer) for layer in model.layers]
    watched = [(layer.experts, observer) for layer, observer in zip(model.layers, observers, strict=True)]
    loss_sum, num_batches, num_tokens, num_predicted_tokens = 0.0, 0, 0, 0
    with (
        frozen_parameters(model.model),
        gradient_from_embeddings(model.model),
        observe_experts(model.model, watched),
    ):
        for number, ids_NW, loss in backward_by_spans(model, batches, spans):
            check_finite(number, loss, observers)
            if number < num_batches:  # in an earlier span than the last, where the loss is
                continue
            loss_sum += loss.item()
            num_batches += 1
            num_tokens += ids_NW.numel()
            num_predicted_tokens += ids_NW[:, 1:].numel()
            on_batch(num_tokens, loss_sum / num_predicted_tokens)
    layers = {observer.index: observer.statistics() for observer in observers}
    return Statistics(
        layers=layers, num_tokens=num_tokens, num_predicted_tokens=num_predicted_tokens, loss_sum=loss_sum
    )


# In order of computation.
FORWARD = (
    "router_weight_sum_E",
    "h_abs_sum_EF",
    "h_sq_sum_EF",
    "output_norm_sum_E",
    "ph_sq_sum_EF",
)
BACKWARD = ("g_sq_sum_EF", "gh_sum_EF", "gh_sq_sum_EF")


def check_finite(batch: int, loss: Tensor, observers: Sequence[LayerObserver]) -> None:
    """Stop at the first batch that is not finite and name where it began: forward statistics from the first
    layer on, then the loss, then backward statistics from the last layer on.

    Raises:
        FloatingPointError: naming layer and batch.
    """
    forward = [(observer, name) for observer in observers for name in FORWARD]
    backward = [(observer, name) for observer in reversed(observers) for name in BACKWARD]
    sums = (
        [observer.sums[name].sum() for observer, name in forward]
        + [loss]
        + [observer.sums[name].sum() for observer, name in backward]
    )
    # One synchronisation.
    finite = torch.stack([value.to(loss.device, torch.float64) for value in sums]).isfinite().tolist()
    if all(finite):
        return
    places = [f"statistic {name} of layer {observer.index}" for observer, name in forward]
    places += ["the loss, behind the last layer,"]
    places += [f"statistic {name} of layer {observer.index}" for observer, name in backward]
    first = places[finite.index(False)]
    raise FloatingPointError(
        f"calibration: {first} is NaN or infinite in batch {batch}; use a wider model.dtype, or look at"
        " weights and text"
    )
