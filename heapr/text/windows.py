"""Cuts corpora into windows of tokens, and draws a sample of windows with a seed.

In: documents and a tokenizer. Out: `TokenWindows`. Documents are joined by blank lines, tokenized as one text
and cut into non-overlapping windows; the remainder is dropped (docs/method.md).
Shape letters: T tokens, N windows, W tokens of a window.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from heapr.errors import ConfigError
from heapr.text.chat import as_text
from heapr.text.corpora import Corpus
from heapr.text.mixture import Mixture, apportion, parts_of
from heapr.text.passages import Documents, drawn
from heapr.text.tokenizing import joined_length, token_ids
from heapr.types import TokenWindows

logger = logging.getLogger(__name__)


def tokenize(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_characters: int | None = None,
    seed: int = 0,
    least: int = 0,
) -> Tensor:
    """All tokens of a corpus, int32 (T,).

    Args:
        corpus: the text.
        tokenizer: of the model.
        max_characters: from a longer corpus, documents are drawn at random (passages.py); None uses all.
        seed: of the random draw.
        least: number of tokens that are needed.

    Raises:
        ConfigError: the text is too short for `least` tokens, with any tokenizer.
    """
    what = _in_words(corpus)

    def documents() -> Iterable[str]:
        return as_text(corpus.documents(), tokenizer, corpus=corpus.name)

    chosen: Documents = documents
    if max_characters is not None:
        chosen = drawn(documents, max_characters, seed=seed, what=what)
    num_characters = joined_length(chosen())
    if least > num_characters:  # otherwise it would be found only when all of the text is tokenized
        num_bytes = sum(len(document.encode()) for document in chosen())
        if least > num_bytes + num_characters:
            raise ConfigError(
                f"corpus '{corpus.name}' (split {corpus.split}) has {num_bytes} bytes, which cannot give"
                f" {least} tokens; ask for fewer or shorter sequences, or give more text"
            )
    return token_ids(chosen, tokenizer, num_characters=num_characters, what=what)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Tokens that the tokenizer adds around a text, which is the whole corpus, not each window."""
    ids = tokenizer("")["input_ids"]
    return [str(token) for token in tokenizer.convert_ids_to_tokens(ids)]


def windows(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    max_characters: int | None = None,
    seed: int = 0,
    least: int = 1,
) -> TokenWindows:
    """Non-overlapping windows of a corpus, or of documents drawn from it, in order, without the remainder.

    Args:
        corpus, tokenizer, max_characters, seed: as for `tokenize`.
        length: tokens per window.
        least: number of windows that are needed.

    Raises:
        ConfigError: the corpus is shorter than one window, or far too short for `least`.
    """
    num_tokens = length * (least if least > 1 else 0)
    tokens_T = tokenize(corpus, tokenizer, max_characters=max_characters, seed=seed, least=num_tokens)
    return cut(tokens_T, corpus, length)


def cut(tokens_T: Tensor, corpus: Corpus, length: int) -> TokenWindows:
    """The non-overlapping windows of a corpus's tokens, in order, without the remainder.

    Raises:
        ConfigError: there are fewer tokens than one window has.
    """
    num_windows, num_left = divmod(len(tokens_T), length)
    if num_windows == 0:
        raise ConfigError(
            f"corpus '{corpus.name}' (split {corpus.split}) has {len(tokens_T)} tokens, "
            f"less than one window of {length}; give more text or a shorter window"
        )
    what = _in_words(corpus)
    found = f"{num_windows} windows of {length} tokens, {num_left} tokens left over"
    logger.info("%-9s %s: %s", "corpus", what, found)
    num_used = num_windows * length
    return TokenWindows(ids_NW=tokens_T[:num_used].view(num_windows, length))


def draw(
    text: Corpus | Mixture,
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    num_samples: int,
    seed: int,
    max_characters: int | None = None,
) -> TokenWindows:
    """Draw windows without replacement from a corpus, or from the corpora of a mixture by their shares.

    Every corpus of a mixture is sampled with the same seed, so that it contributes the same windows as it
    would alone.

    Args:
        text: corpus or mixture.
        tokenizer, length, max_characters: as for `windows`.
        num_samples: number of windows.
        seed: for drawing windows, and for drawing documents.

    Raises:
        ConfigError: a corpus has too few windows, or its share is too small for one window.
    """
    parts = parts_of(text)
    shares = [share for _, share in parts]
    counts = apportion(num_samples, shares)
    samples: list[Tensor] = []
    shown: list[str] = []
    for (corpus, share), count in zip(parts, counts, strict=True):
        if count == 0:
            raise ConfigError(
                f"corpus '{corpus.name}' has a share of {share:.3g} in the mixture, "
                f"which is none of {num_samples} sequences; "
                "raise its weight or calibration.num_samples, or leave it out"
            )
        available = windows(
            corpus, tokenizer, length=length, max_characters=max_characters, seed=seed, least=count
        )
        chosen = sample(available, num_samples=count, seed=seed, corpus_name=corpus.name)
        samples.append(chosen.ids_NW)
        shown.append(f"{count} of {_in_words(corpus)}")
    if len(parts) > 1:
        logger.info("%-9s mixture of %d sequences: %s", "corpus", num_samples, ", ".join(shown))
    return TokenWindows(ids_NW=torch.cat(samples).long())


def sample(available: TokenWindows, *, num_samples: int, seed: int, corpus_name: str) -> TokenWindows:
    """Draw windows without replacement; they stay in the order in which they are drawn.

    As in the published protocol, `random.Random(seed).sample(range(number of windows), num_samples)` draws
    them: the same text, tokenizer and seed give the paper's windows.

    Raises:
        ConfigError: there are fewer windows than samples; the message says how many there are.
    """
    num_windows, length = available.ids_NW.shape
    if num_samples > num_windows:
        raise ConfigError(
            f"calibration.num_samples asks for {num_samples} sequences of corpus '{corpus_name}', "
            f"which holds {num_windows} of {length} tokens; ask for at most that many, "
            "shorten calibration.sequence_length or give more text"
        )
    chosen = random.Random(seed).sample(range(num_windows), num_samples)
    return TokenWindows(ids_NW=available.ids_NW[chosen])


def batches(token_windows: TokenWindows, batch_size: int) -> Iterator[Tensor]:
    """Batches of up to `batch_size` windows, in order, int64 (N,W)."""
    for ids_NW in token_windows.ids_NW.split(batch_size):
        yield ids_NW.long()


def _in_words(corpus: Corpus) -> str:
    return f"{corpus.name} ({corpus.split})"
