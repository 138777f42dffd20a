"""Drawing from more text than is wanted: by seed, within the limit, in order; memory stays small."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from heapr.errors import ConfigError
from heapr.text.corpora import TextFiles
from heapr.text.passages import drawn
from heapr.text.windows import draw, tokenize
from tests.experiment import compose_experiment
from tests.tiny import byte_tokenizer

DOCUMENTS = [f"document {number} " + "x" * (number % 7) for number in range(200)]


def some(limit: int, seed: int = 0, documents: list[str] = DOCUMENTS) -> list[str]:
    return list(drawn(lambda: documents, limit, seed=seed, what="text")())


def test_drawn_by_seed_within_the_limit_and_in_order() -> None:
    first = some(1000)
    assert first == [text for text in DOCUMENTS if text in set(first)]
    assert 1000 - 20 < sum(map(len, first)) <= 1000
    assert first == some(1000) != some(1000, seed=1)
    numbers = [DOCUMENTS.index(text) for text in some(1000)]
    assert min(numbers) < 40 and max(numbers) > 160  # from everywhere


def test_everything_where_it_is_not_above_the_limit(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    total = sum(map(len, DOCUMENTS))
    assert some(total) == DOCUMENTS and not caplog.messages
    assert len(some(total - 1)) < len(DOCUMENTS)
    assert (
        f"{total} characters, above calibration.max_characters={total - 1}; 199 of 200 documents"
        in caplog.text
    )


def test_a_document_longer_than_the_limit_is_drawn_in_passages() -> None:
    lines = [f"line {number}\n" for number in range(1000)]
    passages = some(300, documents=["".join(lines)])
    assert passages and all(passage.endswith("\n") and passage.startswith("line ") for passage in passages)
    assert some(300, documents=["y" * 10_000]) == ["y" * 300]


def test_windows_of_large_text_are_those_of_the_documents_drawn(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    corpus, tokenizer = TextFiles([str(path)], split="all"), byte_tokenizer()
    text = tokenizer.decode(tokenize(corpus, tokenizer, max_characters=1000, seed=3))
    assert text == "\n\n".join(some(1000, seed=3))
    everything = [
        draw(corpus, tokenizer, length=16, num_samples=9, seed=3, max_characters=limit).sha256
        for limit in (None, 10**6)
    ]
    assert everything[0] == everything[1]


def test_the_limit_is_part_of_the_key(tmp_path: Path) -> None:
    from heapr.dry_run import dry_run

    (tmp_path / "a.txt").write_text("some text")
    settings = [
        "calibration=text_files",
        f"calibration.corpus.paths=[{tmp_path}/a.txt]",
        "calibration.num_samples=4",
        f"paths.outputs={tmp_path}",
        "evaluation=none",
    ]
    limits: list[list[str]] = [
        [],
        *([f"calibration.max_characters={limit}"] for limit in ("20000000", "1000", "null")),
    ]
    keys = [dry_run(compose_experiment(*settings, *limit)).stages[0].key for limit in limits]
    assert keys[0] == keys[1] and len(set(keys)) == 3
    with pytest.raises(ConfigError, match="calibration.max_characters=0 is below 1"):
        compose_experiment(*settings, "calibration.max_characters=0")


PEAK = """
import resource, sys
from heapr.text.corpora import TextFiles
from heapr.text.windows import draw
from tests.tiny import byte_tokenizer
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
tokenizer, before = byte_tokenizer(), peak()
corpus = TextFiles([sys.argv[1]], split="all")
corpus.identity()
draw(corpus, tokenizer, length=64, num_samples=8, seed=0, max_characters=1_000_000)
print((peak() - before) / 1024)
"""


@pytest.mark.slow
def test_memory_does_not_follow_the_size_of_the_file(tmp_path: Path) -> None:
    """20 MB of text, of which one is used; before, it took two gigabytes."""
    path = tmp_path / "a.jsonl"
    text = "Some words of a document that is as long as many. " * 80
    path.write_text("".join(json.dumps({"text": f"{number} {text}"}) + "\n" for number in range(5000)))
    command = [sys.executable, "-c", PEAK, str(path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert float(done.stdout) < 60, "MiB"
