"""Perplexity on one corpus.

In: a model and a corpus. Out: `perplexity/<corpus>`, the mean loss of every window, and how exactly it was
measured; from the windows of two models, how sure the increase is. Protocol (docs/method.md): documents
joined by blank lines, non-overlapping windows, remainder dropped, the first token of each window not
predicted. Losses are float32, whatever the model's dtype, and their sum float64.
Shape letters: N windows, W tokens of a window.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import stdev
from typing import Annotated, Any

import torch
from annotated_types import Ge

from heapr.evaluation.measurement import Material, Need
from heapr.model.load import ModelSource
from heapr.model.moe import next_token_loss
from heapr.model.passes import final_hidden_states
from heapr.progress import progress
from heapr.text.corpora import Corpus
from heapr.text.tokenizing import DOCUMENT_SEPARATOR
from heapr.text.windows import batches, special_tokens, windows
from heapr.types import Evaluation, Metrics, ProtocolRecord, TokenWindows

MAX_MEAN_LOSS = 700.0  # exp() of more is not a number; a model that bad has no perplexity to speak of
WINDOW_LOSSES = "window_losses"  # in the details of the evaluation


class Perplexity:
    """exp of the mean next-token cross-entropy.

    Memory beside the weights: hidden states of one batch, batch_size * window * D elements a layer, and never
    more logits than `LOGITS_CHUNK` elements (heapr/model/moe.py; 256 MiB in float32, and their softmax),
    however large batch and vocabulary.

    Args:
        corpus: the text.
        window: tokens of a window, at least 2.
        batch_size: windows per forward pass, at least 1; changes the result by rounding alone.
    """

    needs = frozenset({Need.MODEL, Need.CORPUS})

    def __init__(
        self, corpus: Corpus, window: Annotated[int, Ge(2)], batch_size: Annotated[int, Ge(1)]
    ) -> None:
        self.corpus, self.window, self.batch_size = corpus, window, batch_size
        self.name = f"perplexity/{corpus.name}"
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

    @torch.no_grad()
    def __call__(self, material: Material) -> Evaluation:
        assert self._windows is not None, "prepare() comes first"
        model = material.model()
        num_batches = math.ceil(len(self._windows.ids_NW) / self.batch_size)
        losses: list[float] = []
        bar = progress(batches(self._windows, self.batch_size), total=num_batches, description=self.name)
        for number, (ids_NW, hidden) in enumerate(final_hidden_states(model, bar)):
            loss_N = next_token_loss(model, hidden, ids_NW).double().mean(dim=1)
            if not loss_N.isfinite().all():
                raise FloatingPointError(
                    f"{self.name}: the loss is NaN or infinite in batch {number}; use a wider model.dtype"
                )
            losses += loss_N.tolist()
        metrics = {
            self.name: perplexity_of(losses),
            f"num_tokens/{self.corpus.name}": self._windows.ids_NW.numel(),
        }
        protocols = {self.corpus.name: self._protocol(self._windows)}
        return Evaluation(
            metrics, details={"protocols": protocols, WINDOW_LOSSES: {self.corpus.name: losses}}
        )

    def _protocol(self, token_windows: TokenWindows) -> ProtocolRecord:
        """What decides whether two perplexities may be compared."""
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


def perplexity_of(window_losses: Sequence[float]) -> float:
    """exp of the mean loss. Every window predicts the same number of tokens, so their mean is that of the
    tokens.

    Args:
        window_losses: mean next-token cross-entropy of each window, in nats per token.
    """
    return math.exp(min(math.fsum(window_losses) / len(window_losses), MAX_MEAN_LOSS))


def perplexity_increases(
    dense: Mapping[str, Sequence[float]], pruned: Mapping[str, Sequence[float]]
) -> Metrics:
    """How much pruning raises each corpus' perplexity, and the standard error of that.

    With a_i and b_i the mean losses of window i under the dense and the pruned model, A and B their
    perplexities, the increase B - A has by the delta method, its windows paired, the standard error

        sqrt(sum over i of (z_i - mean z)^2 / (N (N - 1))),   z_i = B b_i - A a_i

    Args:
        dense, pruned: mean loss of each window in nats per token, by corpus; of the same windows.

    Returns:
        `perplexity_increase/<corpus>`, and of two windows or more
        `perplexity_increase_standard_error/<corpus>`.
    """
    metrics: Metrics = {}
    for corpus in dense.keys() & pruned.keys():
        before, after = perplexity_of(dense[corpus]), perplexity_of(pruned[corpus])
        metrics[f"perplexity_increase/{corpus}"] = after - before
        weighted = [after * b - before * a for a, b in zip(dense[corpus], pruned[corpus], strict=True)]
        if len(weighted) > 1:
            metrics[f"perplexity_increase_standard_error/{corpus}"] = stdev(weighted) / math.sqrt(
                len(weighted)
            )
    return dict(sorted(metrics.items()))
