"""Corpora: splits that never overlap, fixed order, identities that follow the content, clear refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from heapr.calibration.corpora import PARTS, PackageDocs, PyDocs, TextFiles, select_split, share_text
from heapr.errors import ConfigError


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
    assert names["validation"] == ("pydocs_validation", "numpydocs_validation") and names["test"] == ("pydocs_test", "numpydocs_test")
    assert {PyDocs(split).identity()["corpus"] for split in PARTS} == {"pydocs"}


def test_splits_share_text_if_they_share_a_part() -> None:
    identities = {split: PyDocs(split).identity() for split in PARTS}
    apart = {(a, b) for a in PARTS for b in PARTS if not share_text(identities[a], identities[b])}
    one_way = {("train", "heldout"), ("train", "validation"), ("train", "test"), ("validation", "test")}
    assert apart == one_way | {(b, a) for a, b in one_way}
    assert not share_text(identities["all"], PackageDocs("numpy", "all").identity())
    published = {"corpus": "ptb", "column": "sentence", "sha256": "0"}
    assert share_text(published | {"split": "train"}, published | {"split": "test"})  # one local file, given twice


def test_pydocs_holds_real_docstrings_of_the_standard_library_and_no_tests(pydocs: dict[str, list[str]]) -> None:
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
    selected = select_split([*documents, "text 3", "  "], "all")
    assert selected == documents
    train, heldout = select_split(documents, "train"), select_split(documents, "heldout")
    assert sorted(train + heldout) == sorted(documents)
    assert heldout[:4] == ["text 21", "text 24", "text 25", "text 33"]  # written down: no document may ever change sides
    assert select_split(documents, "test") == ["text 25", "text 33", "text 62"]


def test_text_files_reads_text_and_json_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one text")
    (tmp_path / "b.jsonl").write_text('{"text": "first"}\n\n{"text": "second"}\n')
    corpus = TextFiles([str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")], split="all")
    assert corpus.documents() == ["one text", "first", "second"]


def test_json_lines_keep_separators_inside_strings_and_take_text_only(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    text = "one\u2028line\x85still"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"text": text}, ensure_ascii=False).encode())
    assert TextFiles([str(path)], split="all").documents() == [text]
    for value in (None, 3, ["text"]):
        path.write_text(json.dumps({"text": value}))
        with pytest.raises(ConfigError, match="line 1 of .* is not a JSON object with text"):
            TextFiles([str(path)], split="all").documents()


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


def test_bad_text_files_are_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (tmp_path / "bad.jsonl").write_text('{"title": "no text"}\n')
    cases = {"missing.txt": "does not exist", "empty.txt": "is empty", "latin.txt": "not UTF-8"}
    for name, message in cases.items():
        with pytest.raises(ConfigError, match=message) as caught:
            TextFiles([str(tmp_path / name)], split="all")
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="line 1 .* field 'text'"):
        TextFiles([str(tmp_path / "bad.jsonl")], split="all").documents()
    with pytest.raises(ConfigError, match="no paths"):
        TextFiles([], split="all")
    with pytest.raises(ConfigError, match="no such package"):
        PackageDocs("no_such_package_anywhere", "all")
    with pytest.raises(ConfigError, match="split 'tset' is unknown"):
        PyDocs("tset")
