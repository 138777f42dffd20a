"""Windows and samples by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from heapr.errors import ConfigError
from heapr.text.corpora import TextFiles
from heapr.text.windows import batches, sample, tokenize, windows
from heapr.types import TokenWindows
from tests.tiny import byte_tokenizer


@pytest.fixture
def corpus(tmp_path: Path) -> TextFiles:
    (tmp_path / "a.jsonl").write_text('{"text": "abcde"}\n{"text": "fgh"}\n')
    return TextFiles([str(tmp_path / "a.jsonl")], split="all")


def test_documents_are_joined_by_blank_lines_and_cut_into_windows(corpus: TextFiles) -> None:
    tokenizer = byte_tokenizer()
    assert tokenizer.decode(tokenize(corpus, tokenizer)) == "abcde\n\nfgh"
    cut = windows(corpus, tokenizer, length=4)
    assert [tokenizer.decode(row) for row in cut.ids_NW] == ["abcd", "e\n\nf"]  # "gh" is the remainder
    assert cut.num_predicted_tokens == 2 * 3


def test_sample_is_seeded_without_repetition() -> None:
    available = TokenWindows(ids_NW=torch.arange(40).view(20, 2))
    first = sample(available, num_samples=10, seed=3, corpus_name="c").ids_NW
    assert torch.equal(first, sample(available, num_samples=10, seed=3, corpus_name="c").ids_NW)
    assert not torch.equal(first, sample(available, num_samples=10, seed=4, corpus_name="c").ids_NW)
    assert len({tuple(row) for row in first.tolist()}) == 10


def test_windows_are_those_of_the_published_protocol() -> None:
    """`random.seed(0); random.sample(range(100), 5)` of any Python 3 gives [49, 97, 53, 5, 33], in this
    order."""
    available = TokenWindows(ids_NW=torch.arange(100).view(100, 1))
    assert sample(available, num_samples=5, seed=0, corpus_name="c").ids_NW.flatten().tolist() == [
        49,
        97,
        53,
        5,
        33,
    ]


def test_too_many_samples_and_too_little_text_are_refused_with_numbers(corpus: TextFiles) -> None:
    available = TokenWindows(ids_NW=torch.arange(40).view(20, 2))
    with pytest.raises(ConfigError, match="asks for 21 sequences of corpus 'c', which holds 20 of 2"):
        sample(available, num_samples=21, seed=0, corpus_name="c")
    with pytest.raises(ConfigError, match="has 10 tokens, less than one window of 11"):
        windows(corpus, byte_tokenizer(), length=11)


def test_batches_cover_everything_in_order() -> None:
    available = TokenWindows(ids_NW=torch.arange(10).view(5, 2))
    assert [len(batch) for batch in batches(available, 2)] == [2, 2, 1]
    assert torch.equal(torch.cat(list(batches(available, 2))), available.ids_NW)
