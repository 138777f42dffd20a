"""Fidelity: how close the pruned model stays to the dense model on held-out text of one corpus.

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
from heapr.model.loss import chunk_size
from heapr.model.moe import MoEModel
from heapr.model.passes import final_hidden_states
from heapr.progress import progress
from heapr.text.corpora import Corpus
from heapr.text.windows import batches, windows
from heapr.types import Evaluation, TokenWindows


class Fidelity:
    """Compares next-token distributions, p of the dense and q of the pruned model:

        kl_to_dense    = mean of KL(p || q) = mean of sum over v of p_v (log p_v - log q_v), in nats per token
        top1_agreement = share of tokens for which p and q have the same most probable token, in [0, 1]

    Means are over the predicted tokens of the corpus. Both models use the same forward of the experts, so
    that only pruning makes a difference. Logits are compared in float32.

    Args:
        corpus: the text.
        window: tokens per window, at least 2.
        batch_size: windows per forward pass, at least 1. Changes the result only by rounding.
        max_windows: number of windows, at least 1, evenly spread over the corpus. None uses all windows.
    """

    needs = frozenset({Need.DENSE_AND_PRUNED, Need.CORPUS})

    def __init__(
        self,
        corpus: Corpus,
        window: Annotated[int, Ge(2)],
        batch_size: Annotated[int, Ge(1)],
        max_windows: Annotated[int, Ge(1)] | None,
    ) -> None:
        self.corpus = corpus
        self.window = window
        self.batch_size = batch_size
        self.max_windows = max_windows
        self.name = f"fidelity/{corpus.name}"
        self.objectives = (f"kl_to_dense/{corpus.name}", f"top1_agreement/{corpus.name}")
        self._windows: TokenWindows | None = None

    def identity(self) -> dict[str, Any]:
        return {
            "evaluator": "fidelity",
            "name": self.name,
            "corpus": self.corpus.identity(),
            "window": self.window,
            "max_windows": self.max_windows,
        }

    def prepare(self, source: ModelSource) -> None:
        ids_NW = windows(self.corpus, source.tokenizer, length=self.window).ids_NW
        available = len(ids_NW)
        number = min(available, self.max_windows or available)
        chosen_N = torch.arange(number) * available // number
        self._windows = TokenWindows(ids_NW=ids_NW[chosen_N])

    @torch.inference_mode()
    def __call__(self, material: Material) -> Evaluation:
        assert self._windows is not None, "prepare() comes first"
        dense, pruned = material.dense_and_pruned()
        ranks = material.ranks
        shared = ranks.share(batches(self._windows, self.batch_size))
        of_batches: list[tuple[float, int]] = []
        bar = progress(shared, total=len(shared), description=self.name)
        of_dense = final_hidden_states(dense, shared)
        with use_comparable_experts(dense.model), use_comparable_experts(pruned.model):
            of_both = zip(of_dense, final_hidden_states(pruned, bar), strict=True)
            for number, ((_, dense_hidden), (_, pruned_hidden)) in enumerate(of_both):
                found = compare(dense, pruned, dense_hidden, pruned_hidden)
                if not math.isfinite(found[0]):
                    problem = f"the divergence is NaN or infinite in batch {ranks.number(number)}"
                    raise FloatingPointError(f"{self.name}: {problem}; use a wider model.dtype")
                of_batches.append(found)
        divergences, agreements = zip(*ranks.in_order(of_batches), strict=True)
        num_tokens = self._windows.num_predicted_tokens
        metrics = {
            f"kl_to_dense/{self.corpus.name}": sum(divergences) / num_tokens,
            f"top1_agreement/{self.corpus.name}": sum(agreements) / num_tokens,
        }
        return Evaluation(metrics, details={"window": self.window, "num_windows": len(self._windows.ids_NW)})


def compare(
    dense: MoEModel, pruned: MoEModel, dense_hidden: Tensor, pruned_hidden: Tensor
) -> tuple[float, int]:
    """Sum of KL(dense || pruned) in nats over tokens, and the number of equal most probable tokens.

    Logits are computed chunk by chunk.

    Args:
        dense, pruned: the models.
        dense_hidden, pruned_hidden: their final hidden states (N, W, D) of the same tokens.
    """
    divergence = torch.zeros((), dtype=torch.float64, device=dense_hidden.device)
    agreements = torch.zeros((), dtype=torch.int64, device=dense_hidden.device)
    size = chunk_size(dense)
    dense_chunks = _predicting_states(dense_hidden).split(size)
    pruned_chunks = _predicting_states(pruned_hidden).split(size)
    for dense_TD, pruned_TD in zip(dense_chunks, pruned_chunks, strict=True):
        dense_TV = dense.logits(dense_TD)
        pruned_TV = pruned.logits(pruned_TD)
        is_same_T = dense_TV.argmax(dim=-1) == pruned_TV.argmax(dim=-1)
        agreements += is_same_T.sum()
        log_p_TV = dense_TV.log_softmax(dim=-1)
        log_q_TV = pruned_TV.log_softmax(dim=-1)
        summand_TV = log_p_TV.exp() * (log_p_TV - log_q_TV)
        divergence_T = summand_TV.sum(dim=-1)
        divergence += divergence_T.double().sum()
    return divergence.item(), int(agreements)


def _predicting_states(hidden_NWD: Tensor) -> Tensor:
    """Hidden states (T, D) of all tokens but the last of each sequence, which predict the next token."""
    return hidden_NWD[:, :-1].flatten(0, 1)
