"""Perplexity on one corpus.

In: a model and a corpus. Out: `perplexity/<corpus>`, the mean loss of every window, and the exact protocol.
From the windows of two models: the increase and its standard error. Protocol (docs/method.md): documents are
joined by blank lines and cut into non-overlapping windows, the remainder is dropped, and the first token of
each window is not predicted. Losses are float32 for any dtype of the model, and their sum is float64.
Shape letters: N windows, W tokens of a window.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import chain
from statistics import stdev
from typing import Annotated, Any

import torch
from annotated_types import Ge

from heapr.evaluation.measurement import Material, Need
from heapr.model.load import ModelSource
from heapr.model.loss import next_token_loss
from heapr.model.moe import MoEModel
from heapr.model.passes import final_hidden_states
from heapr.progress import progress
from heapr.ranks import ONE_PROCESS, Ranks
from heapr.text.corpora import Corpus
from heapr.text.tokenizing import DOCUMENT_SEPARATOR
from heapr.text.windows import batches, special_tokens, windows
from heapr.types import Batch, Evaluation, Metrics, ProtocolRecord, Tokens, TokenWindows

MAX_MEAN_LOSS = 700.0  # exp() of more than 709 overflows
WINDOW_LOSSES = "window_losses"  # key in the details of the evaluation


class Perplexity:
    """Measures exp(mean next-token cross-entropy).

    Beside the weights, memory holds the hidden states of one batch, batch_size * window * D elements per
    layer, and at most `LOGITS_CHUNK` logits (heapr/model/loss.py; 256 MiB in float32, and the same for
    their softmax), for any batch size and vocabulary.

    Args:
        corpus: the text.
        window: tokens per window, at least 2.
        batch_size: windows per forward pass, at least 1. Changes the result only by rounding.
    """

    needs = frozenset({Need.MODEL, Need.CORPUS})

    def __init__(
        self, corpus: Corpus, window: Annotated[int, Ge(2)], batch_size: Annotated[int, Ge(1)]
    ) -> None:
        self.corpus = corpus
        self.window = window
        self.batch_size = batch_size
        self.name = f"perplexity/{corpus.name}"
        self.objectives = (self.name, f"perplexity_increase/{corpus.name}")
        self._windows: TokenWindows | None = None
        self._special_tokens: list[str] = []

    def identity(self) -> dict[str, Any]:
        return {
            "evaluator": "perplexity",
            "name": self.name,
            "corpus": self.corpus.identity(),
            "window": self.window,
        }

    def prepare(self, source: ModelSource) -> None:
        self._windows = windows(self.corpus, source.tokenizer, length=self.window)
        self._special_tokens = special_tokens(source.tokenizer)

    def __call__(self, material: Material) -> Evaluation:
        assert self._windows is not None, "prepare() comes first"
        batched = list(batches(self._windows, self.batch_size))
        losses = mean_losses(material.model(), batched, self.name, material.ranks)
        metrics = {
            self.name: perplexity_of(losses),
            f"num_tokens/{self.corpus.name}": self._windows.ids_NW.numel(),
        }
        details = {
            "protocols": {self.corpus.name: self._protocol(self._windows)},
            WINDOW_LOSSES: {self.corpus.name: losses},
        }
        return Evaluation(metrics, details)

    def _protocol(self, token_windows: TokenWindows) -> ProtocolRecord:
        """What must be equal for two perplexities to be comparable."""
        return {
            "corpus": self.corpus.identity(),
            "split": self.corpus.split,
            "joiner": DOCUMENT_SEPARATOR,
            "window": self.window,
            "stride": self.window,
            "special_tokens": self._special_tokens,
            "num_tokens": token_windows.ids_NW.numel(),
            "num_predicted_tokens": token_windows.num_predicted_tokens,
            "tokens_sha256": token_windows.sha256,
        }


@torch.inference_mode()
def mean_losses(
    model: MoEModel, tokens: Sequence[Tokens], what: str, ranks: Ranks = ONE_PROCESS
) -> list[float]:
    """Mean next-token cross-entropy of each sequence, in nats per predicted token; 0 where none is predicted.

    Args:
        model: dense or pruned.
        tokens: token ids, int64 (N, W) each, or `Batch`es.
        what: is measured, for messages.
        ranks: the processes that share the batches.

    Raises:
        FloatingPointError: a loss is NaN or infinite.
    """
    shared = ranks.share(map(Batch.of, tokens))
    bar = progress(shared, total=len(shared), description=what)
    ids = (batch.ids_NW for batch in bar)
    states = final_hidden_states(model, ids)
    of_batches: list[list[float]] = []
    for number, (batch, (_, hidden)) in enumerate(zip(shared, states, strict=True)):
        loss_NW = next_token_loss(model, hidden, batch.to(hidden.device).labels_NW).double()
        loss_N = loss_NW.sum(dim=1) / batch.num_predicted.clamp(min=1).to(hidden.device)
        if not loss_N.isfinite().all():
            where = f"batch {ranks.number(number)}"
            raise FloatingPointError(
                f"{what}: the loss is NaN or infinite in {where}; use a wider model.dtype"
            )
        of_batches.append(loss_N.tolist())
    return list(chain.from_iterable(ranks.in_order(of_batches)))


def perplexity_of(window_losses: Sequence[float]) -> float:
    """exp(mean loss).

    All windows predict the same number of tokens, so the mean over windows is the mean over tokens.

    Args:
        window_losses: mean next-token cross-entropy of each window, in nats per token.
    """
    mean = math.fsum(window_losses) / len(window_losses)
    return math.exp(min(mean, MAX_MEAN_LOSS))


def weighted_perplexity(losses: Sequence[float], numbers: Sequence[int]) -> float:
    """exp(mean loss over all predicted tokens) of sequences of different lengths.

    Args:
        losses: mean next-token cross-entropy of each sequence, in nats per token.
        numbers: how many tokens of each are predicted.
    """
    if len(set(numbers)) == 1:
        return perplexity_of(losses)
    total = math.fsum(loss * number for loss, number in zip(losses, numbers, strict=True))
    return perplexity_of([total / sum(numbers)])


def perplexity_increases(
    dense: Mapping[str, Sequence[float]], pruned: Mapping[str, Sequence[float]]
) -> Metrics:
    """Increase of perplexity B - A on each corpus, and its standard error by the delta method:

        sqrt(sum over i of (z_i - mean z)^2 / (N (N - 1))),   z_i = B b_i - A a_i

    with a_i and b_i the mean losses of window i under the dense and the pruned model, and A and B their
    perplexities. The windows are paired.

    Args:
        dense, pruned: mean loss of each window in nats per token, by corpus, for the same windows.

    Returns:
        `perplexity_increase/<corpus>` and, for two or more windows,
        `perplexity_increase_standard_error/<corpus>`.
    """
    metrics: Metrics = {}
    for corpus in dense.keys() & pruned.keys():
        before = perplexity_of(dense[corpus])
        after = perplexity_of(pruned[corpus])
        metrics[f"perplexity_increase/{corpus}"] = after - before
        z = [after * b - before * a for a, b in zip(dense[corpus], pruned[corpus], strict=True)]
        if len(z) > 1:
            error = stdev(z) / math.sqrt(len(z))
            metrics[f"perplexity_increase_standard_error/{corpus}"] = error
    return dict(sorted(metrics.items()))
