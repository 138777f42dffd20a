"""How close the pruned model stays to the dense one on held-out text of one corpus.

In: both models and a corpus. Out: `kl_to_dense/<corpus>` and `top1_agreement/<corpus>`, over the same windows
and tokens as perplexity (docs/method.md).
Shape letters: N sequences, W window, T tokens, D model width, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

import torch
from annotated_types import Ge
from torch import Tensor

from heapr.evaluation.measurement import Material, Need
from heapr.model.experts.dispatch import use_comparable_experts
from heapr.model.load import ModelSource
from heapr.model.moe import MoEModel
from heapr.model.passes import final_hidden_states
from heapr.progress import progress
from heapr.text.corpora import Corpus
from heapr.text.windows import batches, windows
from heapr.types import Evaluation, TokenWindows


class Fidelity:
    """Means over the predicted tokens of a corpus, p the dense and q the pruned model's distribution of the
    next token:

        kl_to_dense    = mean of KL(p || q) = mean of sum over v of p_v (log p_v - log q_v), in nats per token
        top1_agreement = share of tokens at which p and q have the same most probable token, in [0, 1]

    Both models run the same forward of the experts, so that only pruning makes a difference. Logits are
    compared in float32.

    Args:
        corpus: the text.
        window: tokens of a window, at least 2.
        batch_size: windows per forward pass, at least 1; changes the result by rounding alone.
        max_windows: compare on so many windows, at least 1, evenly spread over the corpus; none compares on
            all.
    """

    needs = frozenset({Need.DENSE_AND_PRUNED, Need.CORPUS})

    def __init__(
        self,
        corpus: Corpus,
        window: Annotated[int, Ge(2)],
        batch_size: Annotated[int, Ge(1)],
        max_windows: Annotated[int, Ge(1)] | None,
    ) -> None:
        self.corpus, self.window, self.batch_size, self.max_windows = corpus, window, batch_size, max_windows
        self.name = f"fidelity/{corpus.name}"
        self._windows: TokenWindows | None = None

    def identity(self) -> dict[str, Any]:
        sizes = {"window": self.window, "max_windows": self.max_windows}
        return {"evaluator": "fidelity", "name": self.name, "corpus": self.corpus.identity(), **sizes}

    def prepare(self, source: ModelSource) -> None:
        ids_NW = windows(self.corpus, source.tokenizer, length=self.window).ids_NW
        number = min(len(ids_NW), self.max_windows or len(ids_NW))
        self._windows = TokenWindows(ids_NW=ids_NW[torch.arange(number) * len(ids_NW) // number])

    @torch.no_grad()
    def __call__(self, material: Material) -> Evaluation:
        assert self._windows is not None, "prepare() comes first"
        dense, pruned = material.dense_and_pruned()
        divergence, agreements = 0.0, 0
        num_batches = math.ceil(len(self._windows.ids_NW) / self.batch_size)
        bar = progress(batches(self._windows, self.batch_size), total=num_batches, description=self.name)
        of_dense = final_hidden_states(dense, batches(self._windows, self.batch_size))
        with use_comparable_experts(dense.model), use_comparable_experts(pruned.model):
            of_both = zip(of_dense, final_hidden_states(pruned, bar), strict=True)
            for number, ((_, dense_hidden), (_, pruned_hidden)) in enumerate(of_both):
                batch_divergence, batch_agreements = compare(dense, pruned, dense_hidden, pruned_hidden)
                if not math.isfinite(batch_divergence):
                    raise FloatingPointError(
                        f"{self.name}: the divergence is NaN or infinite in batch {number}; use a wider"
                        " model.dtype"
                    )
                divergence += batch_divergence
                agreements += batch_agreements
        num_tokens = self._windows.num_predicted_tokens
        metrics = {
            f"kl_to_dense/{self.corpus.name}": divergence / num_tokens,
            f"top1_agreement/{self.corpus.name}": agreements / num_tokens,
        }
        return Evaluation(metrics, details={"window": self.window, "num_windows": len(self._windows.ids_NW)})


def compare(
    dense: MoEModel, pruned: MoEModel, dense_hidden: Tensor, pruned_hidden: Tensor
) -> tuple[float, int]:
    """Summed KL(dense || pruned) in nats, and the number of equal most probable tokens, without logits of
    more than a chunk. Final hidden states are (N, W, D)."""
    divergence = torch.zeros((), dtype=torch.float64, device=dense_hidden.device)
    agreements = torch.zeros((), dtype=torch.int64, device=dense_hidden.device)
    dense_TD, pruned_TD = dense_hidden[:, :-1].flatten(0, 1), pruned_hidden[:, :-1].flatten(0, 1)
    size = dense.chunk_size()
    for dense_chunk, pruned_chunk in zip(dense_TD.split(size), pruned_TD.split(size), strict=True):
        dense_TV, pruned_TV = dense.logits(dense_chunk), pruned.logits(pruned_chunk)
        agreements += (dense_TV.argmax(dim=-1) == pruned_TV.argmax(dim=-1)).sum()
        log_p_TV, log_q_TV = dense_TV.log_softmax(dim=-1), pruned_TV.log_softmax(dim=-1)
        divergence += (log_p_TV.exp() * (log_p_TV - log_q_TV)).sum(dim=-1).double().sum()
    return divergence.item(), int(agreements)
