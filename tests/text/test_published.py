"""Published corpora: rows as they come from the hub's cache, a local copy in any format, and clear refusals
without a network."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pyarrow
import pytest
from pyarrow import parquet

from heapr import hub
from heapr.errors import ConfigError
from heapr.plugins import build
from heapr.text.published_corpora import C4, PennTreebank, PublishedText, WikiText2
from heapr.text.windows import tokenize
from tests.tiny import byte_tokenizer

WIKI_LINES = [" \n", " = Title = \n", " \n", " Some text . \n", " Some text . \n"]
WIKI_ROWS = ["", " = Title = \n", "", " Some text . \n", " Some text . \n"]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def write_parquet(path: Path, column: str, rows: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table({column: rows}), path)
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A hub cache; call it for the path of a data set's file in it."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def place(corpus: type[PublishedText], split: str, commit: str) -> Path:
        folder = tmp_path / "hub" / f"datasets--{corpus.repository.replace('/', '--')}"
        if corpus.revision != commit:
            (folder / "refs" / corpus.revision).parent.mkdir(parents=True, exist_ok=True)
            (folder / "refs" / corpus.revision).write_text(commit)
        return folder / "snapshots" / commit / corpus.files[split]

    return place


def test_rows_come_as_published_from_the_hub_cache(cache: Callable[..., Path]) -> None:
    write_parquet(cache(WikiText2, "test", WikiText2.revision), "text", WIKI_ROWS)
    corpus = WikiText2("test")
    assert list(corpus.documents()) == WIKI_ROWS  # empty and repeated rows too
    expected = byte_tokenizer()("\n\n".join(WIKI_ROWS))["input_ids"]
    assert tokenize(corpus, byte_tokenizer()).tolist() == expected


def test_identity_is_the_commit_also_where_the_revision_is_a_reference(cache: Callable[..., Path]) -> None:
    assert WikiText2("test").identity()["commit"] == WikiText2.revision  # known without any file
    write_parquet(cache(PennTreebank, "test", COMMIT), "sentence", ["a b", "c"])
    assert PennTreebank("test").identity()["commit"] == COMMIT
    assert list(PennTreebank("test").documents()) == ["a b", "c"]
    first = PennTreebank("test").identity()
    write_parquet(cache(PennTreebank, "test", COMMIT[::-1]), "sentence", ["a b", "d"])
    assert PennTreebank("test").identity() != first
    assert WikiText2("train").identity() != WikiText2("test").identity()


def test_a_local_text_file_gives_the_rows_of_the_data_set(tmp_path: Path) -> None:
    (tmp_path / "wiki.test.raw").write_text("".join(WIKI_LINES))
    assert list(WikiText2("test", path=str(tmp_path / "wiki.test.raw")).documents()) == WIKI_ROWS
    (tmp_path / "ptb.test.txt").write_text(" no it was n't \n but <unk> \n")
    assert list(PennTreebank("test", path=str(tmp_path / "ptb.test.txt")).documents()) == [
        "no it was n't",
        "but <unk>",
    ]


def test_line_ends_and_a_byte_order_mark_change_no_row_and_no_identity(tmp_path: Path) -> None:
    """A local WikiText-2 from Windows, or from an old Macintosh, is the data set."""
    text = "".join(WIKI_LINES)
    expected = byte_tokenizer()("\n\n".join(WIKI_ROWS))["input_ids"]
    spellings = {
        "lf": text.encode(), "crlf": text.replace("\n", "\r\n").encode(), "cr": text.replace("\n", "\r").encode(),
        "mark": text.encode("utf-8-sig"), "both": text.replace("\n", "\r\n").encode("utf-8-sig"),
    }  # fmt: skip
    identities = set()
    for name, content in spellings.items():
        (tmp_path / f"{name}.raw").write_bytes(content)
        (tmp_path / f"{name}.TXT.GZ").write_bytes(gzip.compress(content))
        for ending in ("raw", "TXT.GZ"):
            corpus = WikiText2("test", path=str(tmp_path / f"{name}.{ending}"))
            assert list(corpus.documents()) == WIKI_ROWS
            assert tokenize(corpus, byte_tokenizer()).tolist() == expected
            identities.add(corpus.identity()["sha256"])
    assert len(identities) == 1


def test_every_format_gives_the_same_documents_and_is_identified_by_content(tmp_path: Path) -> None:
    rows = ["first\nlines", "second", "third"]
    lines = "".join(json.dumps({"text": row, "url": "x"}) + "\n" for row in rows)
    (tmp_path / "c4-validation.json.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "rows.jsonl").write_text(lines)
    write_parquet(tmp_path / "rows.parquet", "text", rows)
    names = ["c4-validation.json.gz", "rows.jsonl", "rows.parquet"]
    corpora = [C4("validation", path=str(tmp_path / name), num_documents=2) for name in names]
    assert all(list(corpus.documents()) == rows[:2] for corpus in corpora)
    (tmp_path / "copy.jsonl").write_text(lines)
    assert (
        C4("validation", path=str(tmp_path / "copy.jsonl"), num_documents=2).identity()
        == corpora[1].identity()
    )
    assert (
        C4("validation", path=str(tmp_path / "copy.jsonl"), num_documents=3).identity()
        != corpora[1].identity()
    )
    (tmp_path / "copy.jsonl").write_text(lines.replace("second", "sekond"))
    assert (
        C4("validation", path=str(tmp_path / "copy.jsonl"), num_documents=2).identity()
        != corpora[1].identity()
    )


def test_a_folder_is_the_data_set_or_holds_one_file_of_the_split(tmp_path: Path) -> None:
    (tmp_path / "ptb.train.txt").write_text("train text")
    (tmp_path / "ptb.test.txt").write_text("test text")
    assert list(PennTreebank("test", path=str(tmp_path)).documents()) == ["test text"]
    (tmp_path / "other.test.txt").write_text("which one?")
    with pytest.raises(
        ConfigError, match="one file with 'test' in its name .* but has other.test.txt, ptb.test.txt"
    ):
        PennTreebank("test", path=str(tmp_path))
    write_parquet(tmp_path / PennTreebank.files["test"], "sentence", ["of the data set"])
    assert list(PennTreebank("test", path=str(tmp_path)).documents()) == ["of the data set"]


def test_missing_without_a_network_is_said_at_once(
    cache: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    started = time.monotonic()
    with pytest.raises(
        ConfigError,
        match=r"'wikitext-2-raw-v1/test.*' of data set Salesforce/wikitext is not .* heapr.prefetch",
    ) as caught:
        list(WikiText2("test").documents())
    with pytest.raises(ConfigError, match="hub cannot be reached"):
        PennTreebank("test").identity()
    assert time.monotonic() - started < 2
    assert "\n" not in str(caught.value)


def test_what_is_missing_is_downloaded_by_its_revision(
    cache: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(
        repository: str, name: str, *, repo_type: str, revision: str, local_files_only: bool = False
    ) -> str:
        assert (repository, repo_type, revision) == ("allenai/c4", "dataset", C4.revision)
        path = cache(C4, "validation", C4.revision)
        if not local_files_only:
            path.parent.mkdir(parents=True)
            path.write_bytes(gzip.compress(b'{"text": "a document"}\n'))
        elif not path.is_file():
            raise huggingface_hub.errors.LocalEntryNotFoundError("not here")
        return str(path)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    monkeypatch.setattr(hub, "hub_is_reachable", lambda: True)
    assert list(C4("validation").documents()) == ["a document"]


def test_bad_published_corpora_are_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "blank.txt").write_text(" \n\n")
    (tmp_path / "a.docx").write_text("x")
    (tmp_path / "broken.parquet").write_bytes(b"no parquet")
    (tmp_path / "cut.json.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 1000)[:-20])
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    write_parquet(tmp_path / "other.parquet", "content", ["x"])
    cases = {
        "none.txt": "does not exist",
        "a.docx": "has none of the endings .txt",
        "blank.txt": "holds no text",
        "broken.parquet": "cannot be read",
        "cut.json.gz": "cannot be read",
        "latin.txt": "line 1 of .* is not UTF-8",
        "other.parquet": "has no column 'text' but content",
    }
    for name, message in cases.items():
        with pytest.raises(ConfigError, match=message) as caught:
            WikiText2("test", path=str(tmp_path / name)).identity()
        assert "\n" not in str(caught.value)
    with pytest.raises(
        ConfigError, match="wikitext2 has no split 'heldout'; choose one of train, validation, test"
    ):
        WikiText2("heldout")
    with pytest.raises(
        ConfigError, match="here.num_documents=0 is below 1; give a whole number of at least 1 or null"
    ):
        build(
            {"_target_": "heapr.text.published_corpora.C4", "split": "validation", "num_documents": 0}, "here"
        )
