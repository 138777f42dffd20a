"""Text in pieces gives the tokens of the whole text, whatever the kind of tokenizer; what cannot be had in
pieces is had at once."""

from __future__ import annotations

import functools
import logging
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

import heapr
from heapr.text import tokenizing
from heapr.text.corpora import PackageDocs, PyDocs
from heapr.text.tokenizing import DOCUMENT_SEPARATOR, joined_length, token_ids
from heapr.text.windows import tokenize

BUILTIN = Path(heapr.__file__).parent / "model" / "builtin" / "qwen3_moe_tiny"
DIGITS_BY_THREE = (  # as Llama 3 and Qwen cut
    r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@functools.cache
def documents() -> list[str]:
    """Prose, and what pieces may be cut in: long numbers, lines without a blank, blanks, several bytes a
    character, special tokens."""
    rng = random.Random(0)
    odd = [
        "7" * 3001, "=" * 2500, " " * 2000, "\n" * 1500, "0123456789" * 300, "\t \n" * 500, "é" * 1200, "日本語のテキスト" * 200,
        "\U0001f600\U0001f468\u200d\U0001f469" * 300, "<|endoftext|>" * 200, "a" * 5000, "x\u0301" * 900, "", "  ", "ab <|endoftext|> cd",
    ]  # fmt: skip
    prose = PackageDocs("numpy", "heldout").documents()[:150]
    mixed = [text for text in prose for text in (text, rng.choice(odd))]
    return [*mixed, "the end"]


def trained(kind: str) -> PreTrainedTokenizerBase:
    """Tokenizers of the kinds that models have."""
    end = "<|endoftext|>"
    if kind == "builtin":
        return AutoTokenizer.from_pretrained(BUILTIN)
    special = {"special_tokens": [end, "<unk>"], "show_progress": False, "vocab_size": 700}
    if kind in ("bytes", "digits by three"):
        tokenizer = Tokenizer(models.BPE())
        split = (
            [pre_tokenizers.Split(Regex(DIGITS_BY_THREE), "isolated")] if kind == "digits by three" else []
        )
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [*split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not split)]
        )
        tokenizer.normalizer = normalizers.NFC() if split else None
        trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **special)
        tokenizer.decoder = decoders.ByteLevel()
    elif kind == "words":
        tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
        tokenizer.normalizer, tokenizer.pre_tokenizer = (
            normalizers.BertNormalizer(),
            pre_tokenizers.BertPreTokenizer(),
        )
        trainer = trainers.WordPieceTrainer(**special)
    elif kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(unk_token="<unk>", **special)
    else:  # as Llama 2 and Mixtral: blanks become a letter, one is put in front, nothing is cut before merging
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.BpeTrainer(**special)
    tokenizer.train_from_iterator(PackageDocs("numpy", "train").documents()[:150], trainer)
    if kind == "sentencepiece":
        tokenizer.pre_tokenizer = None
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    if kind in ("sentencepiece", "digits by three"):  # with special tokens around the text
        template = f"{end} $A {end}" if kind == "sentencepiece" else f"{end} $A"
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=[(end, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, unk_token="<unk>")


@pytest.mark.parametrize("kind", ["builtin", "bytes", "digits by three", "words", "unigram", "sentencepiece"])
def test_pieces_give_the_tokens_of_the_whole_text(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = trained(kind)
    whole = tokenizer(DOCUMENT_SEPARATOR.join(documents()), verbose=False)["input_ids"]
    calls = counted(monkeypatch)
    found = token_ids(documents, tokenizer, num_characters=joined_length(documents()), what="text")
    assert found.tolist() == whole
    assert len(calls) > 3, "it was not tokenised in pieces"


def test_a_long_run_is_not_tokenized_over_and_over(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, text = trained("bytes"), ["begin", "x" + "=" * 1_000_001, "some words, " * 3000]
    calls = counted(monkeypatch)
    found = token_ids(lambda: text, tokenizer, num_characters=joined_length(text), what="text")
    assert found.tolist() == tokenizer(DOCUMENT_SEPARATOR.join(text), verbose=False)["input_ids"]
    assert calls.count(1) < 10, "pieces put together"


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pieces each call tokenises."""
    calls: list[int] = []
    original = tokenizing._tokenized

    def count(spans: list[tuple[int, str]], tokenizer: PreTrainedTokenizerBase) -> object:
        calls.append(len(spans))
        return original(spans, tokenizer)

    monkeypatch.setattr(tokenizing, "_tokenized", count)
    return calls


@pytest.mark.parametrize("size", [(64, 16), (301, 40), (1000, 100)])
def test_small_pieces_that_disagree_are_put_together(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizing, "PIECE", size[0])
    monkeypatch.setattr(tokenizing, "CONTEXT", size[1])
    monkeypatch.setattr(tokenizing, "MIN_AGREED", 4)
    text = [
        "Some words, 1234567 and more.",
        "=" * 300,
        "naïve café \U0001f600" * 20,
        "tail 12345678901234567890 of it all",
    ] * 3
    tokenizer = trained("digits by three")
    whole = tokenizer(DOCUMENT_SEPARATOR.join(text))["input_ids"]
    assert (
        token_ids(lambda: text, tokenizer, num_characters=joined_length(text), what="text").tolist() == whole
    )


@pytest.mark.parametrize(
    "corpus",
    [
        pytest.param(lambda: PackageDocs("numpy", "heldout"), id="numpydocs"),
        pytest.param(lambda: PyDocs("train"), id="pydocs", marks=pytest.mark.slow),
    ],
)
def test_the_built_in_corpora_have_the_tokens_of_their_whole_text(corpus: Callable[[], PyDocs]) -> None:
    tokenizer = trained("builtin")
    expected = tokenizer(DOCUMENT_SEPARATOR.join(corpus().documents()), verbose=False)["input_ids"]
    assert tokenize(corpus(), tokenizer).tolist() == expected


def test_a_tokenizer_without_places_gets_the_whole_text(caplog: pytest.LogCaptureFixture) -> None:
    class Slow:
        is_fast = False

        def __call__(self, text: str, *, verbose: bool) -> dict[str, list[int]]:
            return {"input_ids": [ord(letter) for letter in text]}

    caplog.set_level(logging.INFO)
    text = ["a" * 20_000, "b" * 20_000]
    assert len(token_ids(lambda: text, Slow(), num_characters=40_002, what="text")) == 40_002  # type: ignore[arg-type]
    assert "text is tokenized at once, which takes memory" in caplog.text
