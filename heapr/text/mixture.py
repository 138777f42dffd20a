"""Mixtures: several corpora to calibrate on, in proportion to their weights.

In: corpora and weights. Out: a `Mixture`, and how many sequences each corpus contributes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Any

from heapr.errors import ConfigError
from heapr.plugins import build
from heapr.text.corpora import Corpus
from heapr.text.splits import share_text
from heapr.words import unknown_key

PART_KEYS = ("corpus", "weight")
WHERE = "calibration.corpus.parts"


@dataclass(frozen=True)
class Part:
    """One corpus of a mixture.

    Attributes:
        corpus: the text.
        share: its share of the sequences, in (0, 1]; the shares of a mixture add up to 1.
    """

    corpus: Corpus
    share: float

    @cached_property
    def identity(self) -> dict[str, Any]:
        return dict(self.corpus.identity())


class Mixture:
    """Several corpora with weights. They are ordered by identity, so the order in the configuration is free.

    Args:
        parts: entries of any name, each with `corpus`, a plug-in as for a single corpus, and `weight`, above
            0. A corpus's share is its weight over the sum of all weights.

    Raises:
        ConfigError: there are no parts, a part has other keys, or a weight is not above 0, or their sum is
            beyond every number.
    """

    def __init__(self, parts: Mapping[str, Mapping[str, Any]]) -> None:
        if not parts:
            example = "'calibration/parts@calibration.corpus.parts=[pydocs,c4]'"
            raise ConfigError(f"the mixture has no parts; name some, for example {example}")
        weights = {name: _weight(entry, f"{WHERE}.{name}") for name, entry in parts.items()}
        corpora = {name: _corpus(entry, f"{WHERE}.{name}.corpus") for name, entry in parts.items()}
        total = sum(weights.values())
        if not math.isfinite(total):
            raise ConfigError(f"{WHERE}: the weights add up to {total}; give smaller ones, such as 3 and 1")
        self._unordered = [Part(corpora[name], weight / total) for name, weight in weights.items()]
        self.name = self._unordered[0].corpus.name if len(parts) == 1 else "mixture"

    @property
    def parts(self) -> list[tuple[Corpus, float]]:
        """Corpora and their shares.

        Raises:
            ConfigError: two of them have documents in common, which would count twice.
        """
        return [(part.corpus, part.share) for part in self._parts]

    def identity(self) -> dict[str, Any]:
        """Identities and shares of the parts; a mixture of one part has the identity of its corpus."""
        if len(self._parts) == 1:
            return self._parts[0].identity
        parts = [{"corpus": part.identity, "share": part.share} for part in self._parts]
        return {"corpus": self.name, "parts": parts}

    @cached_property
    def _parts(self) -> list[Part]:
        """The parts, ordered by identity."""
        for first, second in combinations(self._unordered, 2):
            if share_text(first.identity, second.identity):
                problem = f"two parts of the mixture are text of corpus '{first.corpus.name}'"
                raise ConfigError(f"{problem}; give it once, with the sum of weights")
        return sorted(self._unordered, key=lambda part: json.dumps(part.identity, sort_keys=True))


def parts_of(text: Corpus | Mixture) -> list[tuple[Corpus, float]]:
    """Corpora and their shares; a single corpus has the share 1."""
    if isinstance(text, Mixture):
        return text.parts
    return [(text, 1.0)]


def identities_of_parts(identity: Mapping[str, Any]) -> list[tuple[Mapping[str, Any], float]]:
    """Identities of the corpora and their shares, from the identity of a corpus or mixture."""
    if "parts" not in identity:
        return [(identity, 1.0)]
    return [(part["corpus"], part["share"]) for part in identity["parts"]]


def apportion(number: int, shares: Sequence[float]) -> list[int]:
    """Whole numbers in proportion to shares that add up to `number` (Hamilton's method).

    Every count is rounded down. What is missing goes to the largest remainders, among equal ones to the
    first.
    """
    exact = [number * share for share in shares]
    counts = [math.floor(count) for count in exact]
    num_left = number - sum(counts)
    by_remainder = sorted(range(len(shares)), key=lambda part: counts[part] - exact[part])
    for part in by_remainder[:num_left]:
        counts[part] += 1
    return counts


def _weight(entry: Mapping[str, Any], where: str) -> float:
    for key in entry:
        if key not in PART_KEYS:
            raise ConfigError(unknown_key(f"{where}.{key}", PART_KEYS))
    weight = entry.get("weight")
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
        problem = f"{where}.weight={weight} is not above 0"
        raise ConfigError(f"{problem}; give a positive number, or leave the part out")
    return float(weight)


def _corpus(entry: Mapping[str, Any], where: str) -> Corpus:
    corpus = build(entry.get("corpus", {}), where)
    if not isinstance(corpus, Corpus):
        kind = type(corpus).__name__
        raise ConfigError(f"{where} is a {kind}, which is not a corpus; see docs/adding.md")
    return corpus
