"""The medium model's tokenizer and tokens, made once of the text: all that training reads.

In: what text.py wrote. Out, in the model's folder: tokens.safetensors, tokenizer/, and texts to measure on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
HELD_OUT_SHARE = 20  # one document in so many
TOKENS = "tokens.safetensors"  # int16, so that a vocabulary may have 32,767 tokens
TOKENIZER_CHARACTERS = 20_000_000  # that the vocabulary is learned from


@dataclass(frozen=True)
class Text:
    """Documents to train on, held out of the same packages, and of packages that nothing is trained on."""

    train: list[str]
    heldout: list[str]
    kept_out: list[str]

    @classmethod
    def read(cls, folder: Path) -> Text:
        """From what text.py wrote. Which document is held out is decided by its hash."""
        about = json.loads((folder / "sources.json").read_text())
        parts: dict[str, list[str]] = {"train": [], "heldout": [], "kept_out": []}
        for package, facts in about.items():
            for line in (folder / f"{package}.jsonl").read_text().splitlines():
                document = json.loads(line)["text"]
                is_held_out = int(sha256(document.encode()).hexdigest(), 16) % HELD_OUT_SHARE == 0
                part = "kept_out" if facts["kept_out"] else "heldout" if is_held_out else "train"
                parts[part].append(document)
        return cls(**parts)


def train_tokenizer(documents: Sequence[str], vocabulary_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE; no token is ever unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    share = max(1, sum(map(len, documents)) // TOKENIZER_CHARACTERS)
    tokenizer.train_from_iterator(documents[::share], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT)


def encode(tokenizer: PreTrainedTokenizerFast, documents: Sequence[str]) -> Tensor:
    """All documents as one row of token ids, int64, an end-of-text behind each."""
    end = [tokenizer.eos_token_id]
    encoded = tokenizer(list(documents), verbose=False)["input_ids"]
    return torch.cat([torch.tensor(ids + end) for ids in encoded])


def prepare(vocabulary_size: int, text_folder: Path, folder: Path) -> str:
    """Write tokenizer and tokens, unless they are there; what the text was.

    Raises:
        SystemExit: they are there with another vocabulary.
    """
    path = folder / TOKENS
    if not path.exists():
        text = Text.read(text_folder)
        write_texts(text, folder)
        tokenizer = train_tokenizer(text.train, vocabulary_size)
        tokenizer.save_pretrained(folder / "tokenizer")
        tokens = {name: encode(tokenizer, getattr(text, name)).to(torch.int16) for name in vars(text)}
        digest = sha256("\0".join(text.train).encode()).hexdigest()
        save_file(tokens, path, metadata={"text": digest, "vocabulary": str(vocabulary_size)})
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    if metadata["vocabulary"] != str(vocabulary_size):
        raise SystemExit(f"{path} has another vocabulary; remove it or choose another --output")
    return str(metadata["text"])


def write_texts(text: Text, folder: Path) -> None:
    """What to measure on, for heapr's `text_files` corpus."""
    for name in ("heldout", "kept_out"):
        lines = [json.dumps({"text": document}) for document in getattr(text, name)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
