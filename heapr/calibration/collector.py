"""The collector: watches every routed expert during one forward and backward pass and keeps running sums.

In: a model and its batches of token ids. Out: `Statistics` (docs/method.md). The identity that makes one pass enough
(docs/method.md, 5): E(x) = W_down h(x), so dloss/dh_k = w_k . g, and the D x D matrices of the published procedure are
never needed.
Shape letters: D model width, E experts, F atomic experts of an expert, n tokens of one expert, N sequences, W window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor

from heapr.model.experts import observe_experts
from heapr.model.moe import MoELayer, MoEModel, frozen_parameters, gradient_from_embeddings
from heapr.model.passes import backward_by_spans
from heapr.model.span import Span
from heapr.types import LayerStatistics, Statistics


class LayerObserver:
    """Running sums of one layer, updated when the gradient of an expert's activations arrives.

    Args:
        layer: what is observed; the sums are kept on its device.
    """

    def __init__(self, layer: MoELayer) -> None:
        self.index = layer.index
        zeros = LayerStatistics.zeros(layer.num_experts, layer.width, layer.experts.down_proj.device)
        self.sums = dict(zeros.items())

    def statistics(self) -> LayerStatistics:
        return LayerStatistics(**self.sums)

    def __call__(self, expert: int, h_nF: Tensor, router_weight_n: Tensor, output_nD: Tensor) -> None:
        if h_nF.requires_grad:
            h_nF.register_hook(partial(self._add, expert, h_nF.detach(), router_weight_n.detach(), output_nD.detach()))

    @torch.no_grad()
    def _add(self, expert: int, h_nF: Tensor, router_weight_n: Tensor, output_nD: Tensor, grad_nF: Tensor) -> None:
        """Add one expert's tokens. Sums over a batch are taken in float32, sums over batches in float64."""
        h_nF, g_nF, p_n = h_nF.float(), grad_nF.float(), router_weight_n.float()
        gh_nF, h_sq_nF, h_abs_nF = g_nF * h_nF, h_nF.square(), h_nF.abs()
        sums = self.sums
        sums["count_E"][expert] += len(p_n)
        sums["router_weight_sum_E"][expert] += p_n.sum()
        sums["output_norm_sum_E"][expert] += p_n @ torch.linalg.vector_norm(output_nD, dim=1, dtype=torch.float32)

        atomic = (expert, slice(0, h_nF.shape[1]))  # experts of a pruned layer have individual widths
        sums["h_sq_sum_EF"][atomic] += h_sq_nF.sum(0)
        sums["g_sq_sum_EF"][atomic] += g_nF.square().sum(0)
        sums["gh_sq_sum_EF"][atomic] += gh_nF.square().sum(0)
        sums["gh_sum_EF"][atomic] += gh_nF.sum(0)
        sums["h_abs_sum_EF"][atomic] += h_abs_nF.sum(0)
        sums["ph_sq_sum_EF"][atomic] += p_n.square() @ h_sq_nF
        largest_F = (p_n.unsqueeze(1) * h_abs_nF).amax(0).double()
        sums["ph_abs_max_EF"][atomic] = torch.maximum(sums["ph_abs_max_EF"][atomic], largest_F)


def collect(
    model: MoEModel,
    batches: Iterable[Tensor],
    *,
    spans: Sequence[Span] | None = None,
    on_batch: Callable[[int, float], None] = lambda num_tokens, loss: None,
) -> Statistics:
    """Statistics of the batches: one forward and one backward each, parameters frozen, gradient from the input embeddings.

    The loss is the *sum* of next-token cross-entropies, so how sequences are batched changes the statistics by rounding alone (about 1e-6
    in float32, docs/method.md); router auxiliary losses play no part. Several spans need the memory of one span at a time and give the
    same statistics, in some families up to rounding (`backward_by_spans`).

    Args:
        model: dense or pruned; for several spans one that passes `check_walk`.
        batches: int64 (N, W) token ids each.
        spans: of decoder layers, one behind the other from the first layer to the last; None is one span.
        on_batch: told, after each batch has reached the loss, the number of tokens so far and their mean loss, in nats per
            predicted token.

    Raises:
        FloatingPointError: a loss or statistic is NaN or infinite; the message names layer and batch.
    """
    spans = [range(len(model.decoder_layers))] if spans is None else spans
    observers = [LayerObserver(layer) for layer in model.layers]
    watched = [(layer.experts, observer) for layer, observer in zip(model.layers, observers, strict=True)]
    loss_sum, num_batches, num_tokens, num_predicted_tokens = 0.0, 0, 0, 0
    with frozen_parameters(model.model), gradient_from_embeddings(model.model), observe_experts(model.model, watched):
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
    return Statistics(layers=layers, num_tokens=num_tokens, num_predicted_tokens=num_predicted_tokens, loss_sum=loss_sum)


FORWARD = ("router_weight_sum_E", "h_abs_sum_EF", "h_sq_sum_EF", "output_norm_sum_E", "ph_sq_sum_EF")  # in order of computation
BACKWARD = ("g_sq_sum_EF", "gh_sum_EF", "gh_sq_sum_EF")


def check_finite(batch: int, loss: Tensor, observers: Sequence[LayerObserver]) -> None:
    """Stop at the first batch that is not finite and name where it began: forward statistics from the first layer on,
    then the loss, then backward statistics from the last layer on.

    Raises:
        FloatingPointError: naming layer and batch.
    """
    forward = [(observer, name) for observer in observers for name in FORWARD]
    backward = [(observer, name) for observer in reversed(observers) for name in BACKWARD]
    sums = [observer.sums[name].sum() for observer, name in forward] + [loss] + [observer.sums[name].sum() for observer, name in backward]
    finite = torch.stack([value.to(loss.device, torch.float64) for value in sums]).isfinite().tolist()  # one synchronisation
    if all(finite):
        return
    places = [f"statistic {name} of layer {observer.index}" for observer, name in forward]
    places += ["the loss, behind the last layer,"]
    places += [f"statistic {name} of layer {observer.index}" for observer, name in backward]
    first = places[finite.index(False)]
    raise FloatingPointError(
        f"calibration: {first} is NaN or infinite in batch {batch}; use a wider model.dtype, or look at weights and text"
    )
