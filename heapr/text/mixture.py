"""Mixtures: several corpora to calibrate on, in proportion to their weights.

In: corpora and weights. Out: a `Mixture`, and how many of a number of sequences each corpus gives.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import combinations
from typing import Any

from heapr.errors import ConfigError
from heapr.schema import build, unknown_key
from heapr.text.corpora import Corpus, share_text

PART_KEYS = ("corpus", "weight")


class Mixture:
    """Sequences of several corpora. The order in which they are named plays no part: they are taken in the order of their identities.

    Args:
        parts: by any name, `corpus`, a plug-in as for a single corpus, and `weight`, above 0; what counts is its share of the sum.

    Raises:
        ConfigError: no parts, a part that is not made so, a weight that is not above 0.
    """

    def __init__(self, parts: Mapping[str, Mapping[str, Any]]) -> None:
        if not parts:
            raise ConfigError("the mixture has no parts; name some, for example 'calibration/parts@calibration.corpus.parts=[pydocs,c4]'")
        weights = {name: _weight(entry, f"calibration.corpus.parts.{name}") for name, entry in parts.items()}
        corpora = {name: _corpus(entry, f"calibration.corpus.parts.{name}.corpus") for name, entry in parts.items()}
        self._unordered = [(corpora[name], weight / sum(weights.values())) for name, weight in weights.items()]
        self.name = corpora[next(iter(parts))].name if len(parts) == 1 else "mixture"

    @property
    def parts(self) -> list[tuple[Corpus, float]]:
        """Corpora and their shares.

        Raises:
            ConfigError: two have documents in common, so that some would count twice.
        """
        return [(corpus, share) for corpus, share, _ in self._parts]

    def identity(self) -> dict[str, Any]:
        """That of the one corpus, or the parts' with their shares."""
        if len(self._parts) == 1:
            return self._parts[0][2]
        return {"corpus": self.name, "parts": [{"corpus": identity, "share": share} for _, share, identity in self._parts]}

    @cached_property
    def _parts(self) -> list[tuple[Corpus, float, dict[str, Any]]]:
        """With the corpora's identities, which put them in order."""
        parts = [(corpus, share, dict(corpus.identity())) for corpus, share in self._unordered]
        for (first, _, one), (_, _, other) in combinations(parts, 2):
            if share_text(one, other):
                raise ConfigError(f"two parts of the mixture are text of corpus '{first.name}'; give it once, with the sum of weights")
        return sorted(parts, key=lambda part: json.dumps(part[2], sort_keys=True))


def parts_of(text: Corpus | Mixture) -> list[tuple[Corpus, float]]:
    """Corpora and their shares; of a single corpus, itself."""
    return text.parts if isinstance(text, Mixture) else [(text, 1.0)]


def identities_of_parts(identity: Mapping[str, Any]) -> list[tuple[Mapping[str, Any], float]]:
    """The same, from an identity to identities."""
    return [(part["corpus"], part["share"]) for part in identity["parts"]] if "parts" in identity else [(identity, 1.0)]


def apportion(number: int, shares: Sequence[float]) -> list[int]:
    """Whole numbers in proportion to shares, `number` in sum: rounded down, and what is left goes to the largest remainders, of
    equal ones to the first (Hamilton's method)."""
    exact = [number * share for share in shares]
    counts = [math.floor(count) for count in exact]
    by_remainder = sorted(range(len(shares)), key=lambda part: counts[part] - exact[part])
    for part in by_remainder[: number - sum(counts)]:
        counts[part] += 1
    return counts


def _weight(entry: Mapping[str, Any], where: str) -> float:
    for key in entry:
        if key not in PART_KEYS:
            raise ConfigError(unknown_key(f"{where}.{key}", PART_KEYS))
    weight = entry.get("weight")
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not (0 < weight < math.inf):
        raise ConfigError(f"{where}.weight={weight} is not above 0; give a positive number, or leave the part out")
    return float(weight)


def _corpus(entry: Mapping[str, Any], where: str) -> Corpus:
    corpus = build(entry.get("corpus", {}), where)
    if not isinstance(corpus, Corpus):
        raise ConfigError(f"{where} is a {type(corpus).__name__}, which is no corpus; see docs/adding.md")
    return corpus
