"""Perplexity on one corpus.

In: a model and a corpus. Out: `perplexity/<corpus>`, and how exactly it was measured. Protocol
(docs/method.md): documents joined by blank lines, non-overlapping windows, remainder dropped, the first token of each window
not predicted. Losses are float32, whatever the model's dtype, and their sum float64.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from heapr.calibration.corpora import DOCUMENT_SEPARATOR, Corpus
from heapr.calibration.sampling import batches, special_tokens, windows
from heapr.model.moe import MoEModel, next_token_loss
from heapr.progress import progress
from heapr.schema import at_least
from heapr.types import Evaluation, ProtocolRecord, Statistics, TokenWindows

MAX_MEAN_LOSS = 700.0  # exp() of more is not a number; a model that bad has no perplexity to speak of


class Perplexity:
    """exp of the mean next-token cross-entropy.

    Memory beside the weights: hidden states of one batch, batch_size * window * D elements a layer, and never more logits than
    `LOGITS_CHUNK` elements (heapr/model/moe.py; 256 MiB in float32, and their softmax), however large batch and vocabulary.

    Args:
        corpus: the text.
        window: tokens of a window, at least 2.
        batch_size: windows per forward pass, at least 1; changes the result by rounding alone.

    Raises:
        ConfigError: a number is out of range.
    """

    uses_statistics = False

    def __init__(self, corpus: Corpus, window: int, batch_size: int) -> None:
        at_least("evaluation.perplexity.window", window, 2)
        at_least("evaluation.perplexity.batch_size", batch_size, 1)
        self.corpus, self.window, self.batch_size = corpus, window, batch_size
        self.name = f"perplexity/{corpus.name}"
        self._windows: TokenWindows | None = None
        self._special_tokens: list[str] = []

    def identity(self) -> dict[str, Any]:
        return {"evaluator": "perplexity", "name": self.name, "corpus": self.corpus.identity(), "window": self.window}

    def prepare(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._windows = windows(self.corpus, tokenizer, length=self.window)
        self._special_tokens = special_tokens(tokenizer)

    @torch.no_grad()
    def __call__(self, model: MoEModel, statistics: Statistics) -> Evaluation:
        assert self._windows is not None, "prepare() comes first"
        num_batches = math.ceil(len(self._windows.ids_NW) / self.batch_size)
        total = 0.0
        bar = progress(batches(self._windows, self.batch_size), total=num_batches, description=self.name)
        for number, ids_NW in enumerate(bar):
            loss_sum = _loss_sum(model, ids_NW.to(model.device))
            if not math.isfinite(loss_sum):
                raise FloatingPointError(f"{self.name}: the loss is NaN or infinite in batch {number}; use a wider model.dtype")
            total += loss_sum
        mean = min(total / self._windows.num_predicted_tokens, MAX_MEAN_LOSS)
        metrics = {self.name: math.exp(mean), f"num_tokens/{self.corpus.name}": self._windows.ids_NW.numel()}
        return Evaluation(metrics, details={"protocols": {self.corpus.name: self._protocol(self._windows)}})

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


def _loss_sum(model: MoEModel, ids_NW: Tensor) -> float:
    """Summed next-token cross-entropy in nats."""
    return float(next_token_loss(model, model.hidden_states(input_ids=ids_NW), ids_NW).double().sum())
