"""From corpora to token windows, and from those to a seeded sample.

In: documents and a tokenizer. Out: `TokenWindows`. Documents are joined by blank lines, tokenised as one text, cut into
non-overlapping windows, the remainder dropped (docs/method.md).
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from heapr.errors import ConfigError
from heapr.text.corpora import Corpus
from heapr.text.mixture import Mixture, apportion, parts_of
from heapr.text.passages import drawn
from heapr.text.tokenizing import joined_length, token_ids
from heapr.types import TokenWindows

logger = logging.getLogger(__name__)


def tokenize(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, *, max_characters: int | None = None, seed: int = 0) -> Tensor:
    """All tokens of a corpus, int32 (T,).

    Args:
        corpus: the text.
        tokenizer: of the model.
        max_characters: of a corpus that has more, only documents drawn by the seed (heapr/text/passages.py); None takes all.
        seed: of that draw.
    """
    what = f"{corpus.name} ({corpus.split})"
    documents = corpus.documents if max_characters is None else drawn(corpus.documents, max_characters, seed=seed, what=what)
    return token_ids(documents, tokenizer, num_characters=joined_length(documents()), what=what)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Tokens that the tokenizer puts around a text by itself; once around the whole corpus, not around each window."""
    return [str(token) for token in tokenizer.convert_ids_to_tokens(tokenizer("")["input_ids"])]


def windows(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, *, length: int, max_characters: int | None = None, seed: int = 0
) -> TokenWindows:
    """Non-overlapping windows of the corpus, or of documents drawn from it (`tokenize`), in order; the remainder is dropped.

    Raises:
        ConfigError: the corpus is shorter than one window.
    """
    tokens = tokenize(corpus, tokenizer, max_characters=max_characters, seed=seed)
    num_windows = len(tokens) // length
    if num_windows == 0:
        raise ConfigError(
            f"corpus '{corpus.name}' (split {corpus.split}) has {len(tokens)} tokens, less than one window of {length}; "
            "give more text or a shorter window"
        )
    used = num_windows * length
    what = f"{corpus.name} ({corpus.split})"
    logger.info("%-9s %s: %d windows of %d tokens, %d tokens left over", "corpus", what, num_windows, length, len(tokens) - used)
    return TokenWindows(ids_NW=tokens[:used].view(num_windows, length))


def draw(
    text: Corpus | Mixture,
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    num_samples: int,
    seed: int,
    max_characters: int | None = None,
) -> TokenWindows:
    """`num_samples` different windows of a corpus, or of several in proportion to their shares, one corpus after the other. Each is
    sampled by itself with the same seed, so one corpus gives the same windows, only fewer, in a mixture and alone. Of a corpus of more
    than `max_characters`, documents are drawn first (`tokenize`).

    Raises:
        ConfigError: a corpus has too few windows, or a part is so small that it gives none.
    """
    parts = parts_of(text)
    counts = apportion(num_samples, [share for _, share in parts])
    samples = []
    for (corpus, share), count in zip(parts, counts, strict=True):
        if count == 0:
            raise ConfigError(
                f"corpus '{corpus.name}' has a share of {share:.3g} in the mixture, which is none of {num_samples} sequences; "
                "raise its weight or calibration.num_samples, or leave it out"
            )
        available = windows(corpus, tokenizer, length=length, max_characters=max_characters, seed=seed)
        samples.append(sample(available, num_samples=count, seed=seed, corpus_name=corpus.name).ids_NW)
    if len(parts) > 1:
        shown = ", ".join(f"{count} of {corpus.name} ({corpus.split})" for (corpus, _), count in zip(parts, counts, strict=True))
        logger.info("%-9s mixture of %d sequences: %s", "corpus", num_samples, shown)
    return TokenWindows(ids_NW=torch.cat(samples).long())


def sample(available: TokenWindows, *, num_samples: int, seed: int, corpus_name: str) -> TokenWindows:
    """`num_samples` different windows: `random.Random(seed).sample(range(number of windows), num_samples)`, in the order drawn.

    That is the published protocol, so that the same text, tokenizer and seed give the paper's windows.

    Raises:
        ConfigError: fewer windows than samples; the message says how many there are.
    """
    num_windows, length = available.ids_NW.shape
    if num_samples > num_windows:
        raise ConfigError(
            f"calibration.num_samples asks for {num_samples} sequences of corpus '{corpus_name}', which holds {num_windows} of {length} "
            "tokens; ask for at most that many, shorten calibration.sequence_length or give more text"
        )
    chosen = random.Random(seed).sample(range(num_windows), num_samples)
    return TokenWindows(ids_NW=available.ids_NW[chosen])


def batches(token_windows: TokenWindows, batch_size: int) -> Iterator[Tensor]:
    """Batches of (up to `batch_size`) windows, in order, int64."""
    return (ids_NW.long() for ids_NW in token_windows.ids_NW.split(batch_size))
