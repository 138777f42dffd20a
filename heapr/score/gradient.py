"""Criteria from activations and their gradients: `heapr` (the paper), `heapr_sum`, `fisher` and `taylor`.

In: statistics. Out: scores that predict a change of the loss. Symbols: h the activation of an atomic expert,
g = dloss/dh with loss the sum over N predicted tokens, n the number of tokens routed to the expert. Equation
numbers are those of docs/method.md.
"""

from __future__ import annotations

from heapr.score.criterion import Unit, WeightsOf, mean_over_routed, unrouted_last
from heapr.types import Granularity, Scores, Statistics


class Heapr:
    """HEAPr's score of atomic expert k (arXiv 2509.22299, ICLR 2026):

        s_k = 1/2 mean(h_k^2) mean(g_k^2)                                                    (6)
            = 1/2 mean(h_k^2) w_k^T G w_k,  G = mean of (dloss/dE)(dloss/dE)^T               (3), (4)

    Means are over the tokens routed to the expert. Experts without tokens score -1.
    """

    unit = Unit.NATS_PER_ROUTED_TOKEN
    granularity = Granularity.ATOMIC_EXPERT

    def __call__(self, statistics: Statistics, weights: WeightsOf) -> Scores:
        scores = {}
        for index, layer in statistics.layers.items():
            h_sq_EF = mean_over_routed(layer.h_sq_sum_EF, layer.count_E)
            g_sq_EF = mean_over_routed(layer.g_sq_sum_EF, layer.count_E)
            scores[index] = unrouted_last(0.5 * h_sq_EF * g_sq_EF, layer)  # (6)
        return Scores(layers=scores)


class HeaprSum:
    """HEAPr's score times the number of routed tokens:

        s_k = n/(2N) mean(h_k^2) mean(g_k^2)                                                 (7)

    This is the predicted increase of the mean loss, in nats per token, if h^2 and g^2 were independent.
    """

    unit = Unit.NATS
    granularity = Granularity.ATOMIC_EXPERT

    def __call__(self, statistics: Statistics, weights: WeightsOf) -> Scores:
        scores = {}
        for index, layer in statistics.layers.items():
            h_sq_EF = mean_over_routed(layer.h_sq_sum_EF, layer.count_E)
            predicted_EF = 0.5 * h_sq_EF * layer.g_sq_sum_EF / statistics.num_predicted_tokens  # (7)
            scores[index] = unrouted_last(predicted_EF, layer)
        return Scores(layers=scores)


class Fisher:
    """Joint second moment of gradient and activation:

        s_k = 1/(2N) sum (g_k h_k)^2                                                         (8)

    This is the predicted increase of the mean loss, in nats per token, without assuming that the two are
    independent.
    """

    unit = Unit.NATS
    granularity = Granularity.ATOMIC_EXPERT

    def __call__(self, statistics: Statistics, weights: WeightsOf) -> Scores:
        scores = {}
        for index, layer in statistics.layers.items():
            predicted_EF = 0.5 * layer.gh_sq_sum_EF / statistics.num_predicted_tokens  # (8)
            scores[index] = unrouted_last(predicted_EF, layer)
        return Scores(layers=scores)


class Taylor:
    """Absolute first-order change of the loss when atomic expert k is removed:

        s_k = |sum g_k h_k|                                                                  (10)

    The sum is over the tokens routed to the expert. Its sign, whether the loss would rise or fall, is
    dropped, so the score has no unit. It follows the first-order importance of Molchanov et al., "Importance
    Estimation for Neural Network Pruning" (arXiv 1906.10771), which takes squares. Experts without tokens
    score -1.
    """

    unit = Unit.NONE
    granularity = Granularity.ATOMIC_EXPERT

    def __call__(self, statistics: Statistics, weights: WeightsOf) -> Scores:
        scores = {}
        for index, layer in statistics.layers.items():
            scores[index] = unrouted_last(layer.gh_sum_EF.abs(), layer)  # (10)
        return Scores(layers=scores)
