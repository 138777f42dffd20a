"""Corpora: splits that never overlap, fixed order, identities that follow the content, clear refusals."""

from __future__ import annotations

from pathlib import Path

import pytest

from heapr.errors import ConfigError
from heapr.text.corpora import PackageDocs, PyDocs, TextFiles
from heapr.text.in_memory import Texts
from heapr.text.mixture import Mixture
from heapr.text.published_corpora import PennTreebank
from heapr.text.splits import PARTS, select_split, share_text


@pytest.fixture(scope="module")
def pydocs() -> dict[str, list[str]]:
    return {split: PyDocs(split).documents() for split in ("train", "heldout", "validation", "test")}


def test_train_and_heldout_never_overlap(pydocs: dict[str, list[str]]) -> None:
    assert not set(pydocs["train"]) & set(pydocs["heldout"])
    assert 0.07 < len(pydocs["heldout"]) / len(pydocs["train"]) < 0.15


def test_validation_and_test_are_the_two_halves_of_heldout(pydocs: dict[str, list[str]]) -> None:
    halves = [pydocs["validation"], pydocs["test"]]
    assert not set(halves[0]) & set(halves[1])
    assert sorted(halves[0] + halves[1]) == sorted(pydocs["heldout"])
    assert all(0.4 < len(half) / len(pydocs["heldout"]) < 0.6 for half in halves)


def test_metrics_say_which_half_and_identities_which_text() -> None:
    names = {split: (PyDocs(split).name, PackageDocs("numpy", split).name) for split in PARTS}
    assert names["train"] == names["heldout"] == names["all"] == ("pydocs", "numpydocs")
    assert names["validation"] == ("pydocs_validation", "numpydocs_validation") and names["test"] == (
        "pydocs_test",
        "numpydocs_test",
    )
    assert {PyDocs(split).identity()["corpus"] for split in PARTS} == {"pydocs"}


def test_splits_share_text_if_they_share_a_part() -> None:
    identities = {split: PyDocs(split).identity() for split in PARTS}
    apart = {(a, b) for a in PARTS for b in PARTS if not share_text(identities[a], identities[b])}
    one_way = {("train", "heldout"), ("train", "validation"), ("train", "test"), ("validation", "test")}
    assert apart == one_way | {(b, a) for a, b in one_way}
    assert not share_text(identities["all"], PackageDocs("numpy", "all").identity())
    published = {"corpus": "ptb", "column": "sentence", "sha256": "0"}
    # One local file, given twice.
    assert share_text(published | {"split": "train"}, published | {"split": "test"})


def test_pydocs_holds_real_docstrings_of_the_standard_library_and_no_tests(
    pydocs: dict[str, list[str]],
) -> None:
    import argparse
    import inspect

    everything = set(pydocs["train"]) | set(pydocs["heldout"])
    assert inspect.getdoc(argparse) in everything
    assert not any("test_" in text and "unittest.TestCase" in text and len(text) < 20 for text in everything)
    assert sum(map(len, pydocs["train"])) > 1_000_000


def test_numpydocs_is_another_text(pydocs: dict[str, list[str]]) -> None:
    numpydocs = PackageDocs("numpy", "all").documents()
    assert len(numpydocs) > 500
    assert len(set(numpydocs) & set(pydocs["train"])) < 0.05 * len(numpydocs)


def test_select_split_drops_repeats_and_blanks_and_keeps_order() -> None:
    documents = [f"text {number}" for number in range(100)]
    selected = list(select_split([*documents, "text 3", "  "], "all"))
    assert selected == documents
    train, heldout = list(select_split(documents, "train")), list(select_split(documents, "heldout"))
    assert sorted(train + heldout) == sorted(documents)
    # Written down: no document may ever change sides.
    assert heldout[:4] == [
        "text 21",
        "text 24",
        "text 25",
        "text 33",
    ]
    assert list(select_split(documents, "test")) == ["text 25", "text 33", "text 62"]


def test_text_files_reads_every_form_in_the_order_of_the_paths(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one text")
    (tmp_path / "b.jsonl").write_text('{"text": "first"}\n\n{"text": "second"}\n')
    corpus = TextFiles([str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")], split="all")
    assert list(corpus.documents()) == ["one text", "first", "second"]


def test_identity_of_package_docs_follows_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two installations of a package of one name."""
    identities = []
    for text in ("abc", "xyz", "abc"):
        package = tmp_path / f"installation_{len(identities)}" / "some_package_of_the_test"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(f'"""{text}"""')
        monkeypatch.syspath_prepend(package.parent)
        corpus = PackageDocs(package.name, "all")
        assert corpus.documents() == [text]
        identities.append(corpus.identity())
    assert identities[0] == identities[2] != identities[1]


def test_identity_follows_content_not_path(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one text")
    (tmp_path / "b.txt").write_text("one text")
    (tmp_path / "c.txt").write_text("another text")
    a, b, c = (TextFiles([str(tmp_path / f"{name}.txt")], split="all").identity() for name in "abc")
    assert a == b
    assert a != c
    assert a != TextFiles([str(tmp_path / "a.txt")], split="train").identity()
    assert PyDocs("train").identity() != PyDocs("heldout").identity()


def test_identity_follows_documents_not_their_spelling(tmp_path: Path) -> None:
    spellings = {
        "lf.txt": b"one\ntext\n", "crlf.TXT": b"one\r\ntext\r\n", "cr.md": b"one\rtext\r", "mark.txt": b"\xef\xbb\xbfone\ntext\n",
        "lines.jsonl": b'{"text": "one\\ntext\\n"}\n',
    }  # fmt: skip
    corpora = []
    for name, content in spellings.items():
        (tmp_path / name).write_bytes(content)
        corpora.append(TextFiles([str(tmp_path / name)], split="all"))
    assert [list(corpus.documents()) for corpus in corpora] == [["one\ntext\n"]] * 5
    assert len({corpus.identity()["sha256"] for corpus in corpora}) == 1
    (tmp_path / "lf.txt").write_bytes(b"one \ntext\n")  # the same path with other content
    assert corpora[0].identity() != corpora[1].identity()


def test_home_folder_in_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("some text")
    assert list(TextFiles(["~/a.txt"], split="all").documents()) == ["some text"]
    assert list(PennTreebank("test", path="~/a.txt").documents()) == ["some text"]
    entry = {"_target_": "heapr.text.corpora.TextFiles", "paths": ["~/a.txt"], "split": "all"}
    ((corpus, _),) = Mixture({"x": {"weight": 1, "corpus": entry}}).parts
    assert list(corpus.documents()) == ["some text"]
    with pytest.raises(ConfigError, match="'~nobody_of_this_name/a.txt' does not exist"):
        TextFiles(["~nobody_of_this_name/a.txt"], split="all")
    with pytest.raises(ConfigError, match="'~nobody_of_this_name/a.txt' does not exist"):
        PennTreebank("test", path="~nobody_of_this_name/a.txt")


def test_bad_text_files_are_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "a.docx").write_text("x")
    (tmp_path / "bad.jsonl").write_text('{"title": "no text"}\n')
    cases = {
        "missing.txt": "does not exist",
        "empty.txt": "is empty",
        "a.docx": "has none of the endings .txt",
    }
    for name, message in cases.items():
        with pytest.raises(ConfigError, match=message) as caught:
            TextFiles([str(tmp_path / name)], split="all")
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="line 1 .* field 'text'"):
        TextFiles([str(tmp_path / "bad.jsonl")], split="all").identity()
    with pytest.raises(ConfigError, match="no paths"):
        TextFiles([], split="all")
    with pytest.raises(ConfigError, match="no such package"):
        PackageDocs("no_such_package_anywhere", "all")
    with pytest.raises(ConfigError, match="split 'tset' is unknown"):
        PyDocs("tset")


def test_a_folder_is_all_its_files_that_can_be_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    folder = tmp_path / ".in a hidden folder" / "texts"
    for name in ("b/z.TXT", "b/.hidden/x.txt", "a.md", ".config.json", "notes.docx", "b/c.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"text of {name}")
    (tmp_path / "last.txt").write_text("the last")
    corpus = TextFiles([str(folder), str(tmp_path / "last.txt")], split="all")
    assert list(corpus.documents()) == ["text of a.md", "text of b/c.txt", "text of b/z.TXT", "the last"]
    assert "3 files read, 1 left out for their names, such as notes.docx" in caplog.text
    (folder / "empty.jsonl").touch()
    with pytest.raises(ConfigError, match=r"'.*empty.jsonl' is empty; give a file with text"):
        TextFiles([str(folder)], split="all")
    (tmp_path / "hidden").mkdir()
    with pytest.raises(ConfigError, match=r"folder '.*hidden' has no file of text; give one with .txt, "):
        TextFiles([str(tmp_path / "hidden")], split="all")


def test_only_the_first_documents_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b"}\nnonsense\n')
    corpus = TextFiles([str(tmp_path / "a.jsonl")], split="all", num_documents=2)
    assert list(corpus.documents()) == ["a", "b"]
    (tmp_path / "b.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    assert corpus.identity() == TextFiles([str(tmp_path / "b.jsonl")], split="all").identity()


def test_a_fingerprint_of_texts_knows_where_each_ends() -> None:
    cut = [["ab", "c"], ["a", "bc"], ["abc"], ["c", "ab"]]
    fingerprints = {Texts(documents).identity()["sha256"] for documents in cut}
    assert len(fingerprints) == len(cut)
    assert Texts(iter(cut[0])).identity() == Texts(cut[0]).identity()
