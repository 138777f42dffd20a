"""Criteria that remove whole experts: `reap`, `frequency` and `heapr_expert`.

In: statistics. Out: scores, the same for all atomic experts of an expert; they predict nothing about a single
one, so they have no unit. The router stays as it is: a token that is routed to a removed expert gets nothing
from it.
Shape letters: E experts, F atomic experts of an expert. Equation numbers are those of docs/method.md.
"""

from __future__ import annotations

from torch import Tensor

from heapr.score.criterion import Unit, WeightsOf, unrouted_last
from heapr.score.gradient import Heapr
from heapr.types import Granularity, LayerStatistics, Scores, Statistics


class Reap:
    """Mean norm of an expert's contribution to its layer's output:

        s = 1/n sum p ||E(x)||                                                               (13)

    with n the number of tokens routed to the expert, p its router weight as the model applies it and ||E(x)||
    the Euclidean norm of its output. Lasby et al., "REAP the Experts: Why Pruning Prevails for One-Shot MoE
    Compression" (arXiv 2510.13999, ICLR 2026). To prune the same number in each layer as the paper does, use
    pruning=layer. Experts without tokens score -1.
    """

    unit = Unit.NONE
    granularity = Granularity.EXPERT

    def __call__(self, statistics: Statistics, weights: WeightsOf) -> Scores:
        scores = {}
        for index, layer in statistics.layers.items():
            mean_E = layer.output_norm_sum_E / layer.count_E.clamp(min=1)  # (13)
            scores[index] = _for_all_atomic(mean_E, layer)
        return Scores(layers=scores)


class Frequency:
    """How often an expert is used, a common baseline:

        s = n                                                                                (14)

    with n the number of tokens routed to the expert. Experts without tokens score -1.
    """

    unit = Unit.NONE
    granularity = Granularity.EXPERT

    def __call__(self, statistics: Statistics, weights: WeightsOf) -> Scores:
        scores = {}
        for index, layer in statistics.layers.items():
            scores[index] = _for_all_atomic(layer.count_E, layer)  # (14)
        return Scores(layers=scores)


class HeaprExpert:
    """HEAPr's score (6) summed over all atomic experts of an expert:

        s = sum_k s_k = 1/2 sum_k mean(h_k^2) mean(g_k^2)                                    (15)

    with h_k the activation of atomic expert k and g_k = dloss/dh_k. A comparison with `heapr` shows what the
    finer granularity gains. Experts without tokens score -1.
    """

    unit = Unit.NONE
    granularity = Granularity.EXPERT

    def __call__(self, statistics: Statistics, weights: WeightsOf) -> Scores:
        atomic = Heapr()(statistics, weights)
        scores = {}
        for index, layer in statistics.layers.items():
            sum_E = atomic.layers[index].double().sum(dim=1)  # (15)
            scores[index] = _for_all_atomic(sum_E, layer)
        return Scores(layers=scores)


def _for_all_atomic(score_E: Tensor, layer: LayerStatistics) -> Tensor:
    """Each expert's score repeated for all of its atomic experts, float32 (E, F)."""
    scores_EF = score_E.unsqueeze(1).expand(layer.shape)
    return unrouted_last(scores_EF, layer)
