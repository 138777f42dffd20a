"""The collector: observes every routed expert during one forward and backward pass and keeps running sums.

In: a model and its batches of token ids. Out: `Statistics` (docs/method.md). One pass is enough because of an
identity (docs/method.md, 5): with g = dloss/dE, E(x) = W_down h(x) gives dloss/dh_k = w_k . g, so the D x D
matrices of the published procedure are never needed.
Shape letters: D model width, E experts, F atomic experts of an expert, S (token, expert) pairs sorted by
expert, n tokens of one expert, N sequences, W window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from heapr.calibration.checkpoints import Checkpoints, Totals, packed, unpack
from heapr.calibration.segments import OneExpert, pair_statistics, segment_statistics
from heapr.model.experts.dispatch import observe_experts
from heapr.model.experts.grouped import Pairs
from heapr.model.experts.loop import split_by_expert
from heapr.model.loss import frozen_parameters, gradient_from_embeddings
from heapr.model.moe import MoELayer, MoEModel
from heapr.model.passes import Way, backward_by_spans
from heapr.model.shelf import Files
from heapr.model.span import Span
from heapr.ranks import ONE_PROCESS, Ranks
from heapr.types import MAXIMA, LayerStatistics, Statistics, Tokens


class LayerObserver:
    """Running sums of one layer, updated once per batch, when the gradient of its activations arrives.

    Args:
        layer: the observed layer.
        device: of the sums.

    Attributes:
        sums: by name of the statistic, float64.
    """

    def __init__(self, layer: MoELayer, device: torch.device) -> None:
        self.index, self.widths = layer.index, layer.widths
        zeros = LayerStatistics.zeros(layer.num_experts, layer.width, device)
        self.sums = dict(zeros.items())
        columns = torch.arange(layer.width, device=device)
        self._is_own_EF = columns < torch.tensor(self.widths, device=device).unsqueeze(1)

    def statistics(self) -> LayerStatistics:
        """The sums so far."""
        return LayerStatistics(**self.sums)

    def __call__(self, h_SF: Tensor, router_weight_S: Tensor, output_SD: Tensor, offsets: Tensor) -> None:
        if h_SF.requires_grad:
            seen = (h_SF.detach(), router_weight_S.detach(), output_SD.detach())
            add_batch = partial(self._add, offsets, seen)
            h_SF.register_hook(add_batch)

    @torch.no_grad()
    def _add(self, offsets: Tensor, seen: tuple[Tensor, Tensor, Tensor], grad_SF: Tensor) -> None:
        """Add one batch: sums within the batch are in float32, sums over batches in float64."""
        if not grad_SF.is_cpu:
            h_SF, router_weight_S, output_SD = seen
            norm_S = torch.linalg.vector_norm(output_SD, dim=1, dtype=torch.float32)
            rows = (h_SF, grad_SF, router_weight_S, norm_S)
            self.add(Pairs(slice(None), offsets.to(grad_SF.device), *rows))
            return
        # Expert by expert, because the rows of one expert fit into the CPU's cache.
        of_experts = [split_by_expert(rows, offsets) for rows in (*seen, grad_SF)]
        for expert, rows in enumerate(zip(*of_experts, strict=True)):
            h_nF, p_n, output_nD, grad_nF = rows
            if not len(p_n):
                continue
            own = slice(self.widths[expert])
            found = pair_statistics(h_nF[:, own], p_n, output_nD, grad_nF[:, own], OneExpert())
            self._add_to(expert, own, found)

    @torch.no_grad()
    def add(self, pairs: Pairs) -> None:
        """Add one batch of a bucket of experts: what the grouped forward calls in its backward pass."""
        found = segment_statistics(pairs)
        is_own_EF = self._is_own_EF[pairs.experts, : pairs.h_SF.shape[1]]
        for name, value in found.items():
            if name.endswith("_EF"):  # a bucket may be wider than the layer's widest expert
                value_EF = value[:, : is_own_EF.shape[1]]
                found[name] = torch.where(is_own_EF, value_EF, 0)
        self._add_to(pairs.experts, slice(is_own_EF.shape[1]), found)

    def _add_to(self, experts: int | slice | Tensor, atomic: slice, found: dict[str, Tensor]) -> None:
        """Add one batch's statistics to the sums of these experts and these of their atomic experts."""
        for name, value in found.items():
            where = (experts, atomic) if name.endswith("_EF") else experts
            sums = self.sums[name]
            if name in MAXIMA:
                sums[where] = torch.maximum(sums[where], value.double())
            else:
                sums[where] += value


def collect(
    model: MoEModel,
    batches: Iterable[Tokens],
    *,
    way: Way | None = None,
    on_batch: Callable[[int, float], None] = lambda num_tokens, loss: None,
    ranks: Ranks = ONE_PROCESS,
    checkpoints: Checkpoints | None = None,
) -> Statistics:
    """Collect the statistics of all batches: one forward and one backward pass each.

    All parameters are frozen, so the backward pass ends at the input embeddings.

    The loss is the *sum* of next-token cross-entropies, so batching sequences differently changes the
    statistics only by rounding (about 1e-6 in float32, docs/method.md). Router auxiliary losses are left out.
    Several spans need the memory of one span at a time and give the same statistics, in some families up to
    rounding (`backward_by_spans`).

    Args:
        model: dense or pruned; must pass `check_walk` if there are several spans.
        batches: token ids, int64 (N, W) each, or `Batch`es.
        way: how the batches go through the layers. None takes one batch after the other through all of them.
        on_batch: called after each batch's loss is known, with the number of tokens so far and their mean
            loss in nats per predicted token.
        ranks: the processes that collect together, each with its share of the batches, and all with the
            statistics of all batches in the end.
        checkpoints: save the sums now and then, and go on from those that an earlier process saved. Only for
            a way on which each batch goes through all layers before the next one starts; one with a shelf of
            files records by itself.

    Raises:
        FloatingPointError: a loss or statistic is NaN or infinite; the message names layer and batch.
    """
    observers = [LayerObserver(layer, _device_of(layer, model)) for layer in model.layers]
    if way is None:
        way = Way([range(len(model.decoder_layers))])
    way = _recording(observers, replace(way, ranks=ranks))
    watched = [(layer.experts, observer) for layer, observer in zip(model.layers, observers, strict=True)]
    totals = Totals()
    if checkpoints is not None:
        assert len(way.spans) == 1 or not way.together, "other batches are under way"
        checkpoints.recover(observers, totals)
    num_done = totals.num_batches
    with (
        frozen_parameters(model.model),
        gradient_from_embeddings(model.model),
        observe_experts(model.model, watched),
    ):
        left = islice(batches, num_done, None)
        for number, span, batch, loss in backward_by_spans(model, left, way):
            place = num_done + number
            in_span = [observer for observer in observers if observer.index in span]
            check_finite(ranks.number(place), loss, in_span)
            # The last span comes first and gives the loss; earlier spans visit the same batches again.
            if place == totals.num_batches:
                totals.add(batch, loss.item())
                on_batch(totals.num_tokens, totals.loss_sum / totals.num_predicted_tokens)
            if checkpoints is not None and span.start == 0:
                checkpoints.save_if_due(observers, totals)
    return _of_all_ranks(observers, totals, ranks)


def _of_all_ranks(observers: Sequence[LayerObserver], totals: Totals, ranks: Ranks) -> Statistics:
    """The statistics of all batches, from what each process collected of its share."""
    for observer in observers:
        ranks.sum(sums for name, sums in observer.sums.items() if name not in MAXIMA)
        ranks.maximum(sums for name, sums in observer.sums.items() if name in MAXIMA)
    layers = {observer.index: observer.statistics() for observer in observers}
    return Statistics(
        layers=layers,
        num_tokens=ranks.total(totals.num_tokens),
        num_predicted_tokens=ranks.total(totals.num_predicted_tokens),
        loss_sum=ranks.total(totals.loss_sum),
    )


def _device_of(layer: MoELayer, model: MoEModel) -> torch.device:
    """The device on which a layer is, or will be once it is read."""
    device: torch.device = layer.experts.down_proj.device
    return model.device if device.type == "meta" else device


def _recording(observers: Sequence[LayerObserver], way: Way) -> Way:
    """Let a way with a shelf of files record statistics there, too, and go on where a process stopped."""
    if not isinstance(way.shelf, Files):
        return way
    _recover(observers, way.shelf)
    return replace(way, on_span=partial(_keep, observers, way.shelf))


def _keep(observers: Sequence[LayerObserver], files: Files, span: Span) -> None:
    """Write the statistics of a span's layers to files."""
    for observer in observers:
        if observer.index in span:
            files.put(_file_name(observer), packed(observer.sums))


def _recover(observers: Sequence[LayerObserver], files: Files) -> None:
    """Take over the statistics that an earlier process finished."""
    for observer in observers:
        if _file_name(observer) in files:
            unpack(files.get(_file_name(observer)), observer.sums)


def _file_name(observer: LayerObserver) -> str:
    return f"statistics-{observer.index}"


# Statistics of the forward and of the backward pass, in order of computation.
FORWARD = ("router_weight_sum_E", "h_abs_sum_EF", "h_sq_sum_EF", "output_norm_sum_E", "ph_sq_sum_EF")
BACKWARD = ("g_sq_sum_EF", "gh_sum_EF", "gh_sq_sum_EF")


def check_finite(batch: int, loss: Tensor, observers: Sequence[LayerObserver]) -> None:
    """Stop at the first batch whose loss or statistics are not finite.

    Values are checked in the order in which a batch passes them, so that the first bad one is where it began:
    forward statistics from the first layer on, the loss, backward statistics from the last layer on.

    Raises:
        FloatingPointError: a value is NaN or infinite; the message names layer and batch.
    """
    places: list[tuple[str, Tensor]] = []
    values = []

    def add(observer: LayerObserver, names: Sequence[str]) -> None:
        for name in names:
            places.append((f"statistic {name} of layer {observer.index}", observer.sums[name]))
            total = observer.sums[name].sum()
            values.append(total.to(loss.device, torch.float64))

    for observer in observers:
        add(observer, FORWARD)
    places.append(("the loss, behind the last layer,", loss))
    values.append(loss.to(torch.float64))
    for observer in reversed(observers):
        add(observer, BACKWARD)
    # Read all at once, so that a GPU is waited for only once.
    finite = torch.stack(values).isfinite().tolist()
    if all(finite):
        return
    first, tensor = places[finite.index(False)]
    place = f"{first}{_in_expert(tensor)}"
    raise FloatingPointError(
        f"calibration: {place} is NaN or infinite in batch {batch}; use a wider model.dtype, or look at"
        " weights and text"
    )


def _in_expert(tensor: Tensor) -> str:
    """Words that name the first expert whose statistic is not finite; empty for the loss."""
    if tensor.dim() == 0:
        return ""
    is_bad_E = ~tensor.flatten(start_dim=1).isfinite().all(dim=1) if tensor.dim() > 1 else ~tensor.isfinite()
    bad = is_bad_E.nonzero().flatten().tolist()
    return f", expert {bad[0]}," if bad else ""
