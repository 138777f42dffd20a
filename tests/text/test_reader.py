"""The reader of text: every ending in every form, the line in every complaint, JSON never read as prose."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from heapr.errors import ConfigError
from heapr.text import records
from heapr.text.reader import ENDINGS, GZIP, JSON, PARQUET, TEXT, Source, is_readable, kind_of

DOCUMENTS = ["first\nline", 'se"cond', "one\u2028line\x85still", "naïve \U0001f600"]


def read(path: Path, field: str = "text") -> list[str]:
    return list(Source((path,), field).documents())


def spellings_of_json() -> dict[str, str]:
    objects = [{"text": text, "url": "x"} for text in DOCUMENTS]
    return {
        "lines": "\n".join(json.dumps(entry) for entry in objects),
        "lines, blank ones between": (
            "\n\n  \n".join(json.dumps(entry, ensure_ascii=False) for entry in objects) + "\n"
        ),
        "array": json.dumps(objects),
        "array over lines": "\n" + json.dumps(objects, indent=2, ensure_ascii=False) + "\n\n",
    }


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("ending", [ending + last for ending in JSON for last in ("", GZIP)])
def test_json_of_every_ending_and_form(ending: str, end: str, tmp_path: Path) -> None:
    for name, text in spellings_of_json().items():
        for encoding in ("utf-8", "utf-8-sig"):
            content = text.replace("\n", end).encode(encoding)
            for case in (ending, ending.upper()):
                path = tmp_path / f"text{case}"
                path.write_bytes(gzip.compress(content) if ending.endswith(GZIP) else content)
                assert read(path) == DOCUMENTS, name


@pytest.mark.parametrize("ending", [ending + last for ending in TEXT for last in ("", GZIP)])
def test_plain_text_of_every_ending(ending: str, tmp_path: Path) -> None:
    content = "\ufeffNaïve text,\r\n[1] of {two}\rlines. {\n".encode()
    for case in (ending, ending.upper()):
        path = tmp_path / f"text{case}"
        path.write_bytes(gzip.compress(content) if ending.endswith(GZIP) else content)
        assert read(path) == ["Naïve text,\n[1] of {two}\nlines. {\n"]
        by_line = Source((path,), "text", str.strip).documents()
        assert list(by_line) == ["Naïve text,", "[1] of {two}", "lines. {"]


def test_parquet_of_every_kind_of_text(tmp_path: Path) -> None:
    column = pyarrow.array(DOCUMENTS)
    kinds = [column, column.cast("large_string"), column.dictionary_encode()]
    for number, values in enumerate(kinds):
        path = tmp_path / f"{number}.Parquet"
        parquet.write_table(pyarrow.table({"text": values}), path)
        assert read(path) == DOCUMENTS


def test_marks_inside_files_that_were_put_together(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes('\ufeff{"text": "a"}\n\ufeff{"text": "\ufeffb"}\n'.encode())
    (tmp_path / "a.txt").write_bytes("\ufeffa\n\ufeffb\n".encode())
    assert read(tmp_path / "a.jsonl") == ["a", "\ufeffb"]  # what a string holds is its own
    assert read(tmp_path / "a.txt") == ["a\nb\n"]


def test_every_other_ending_is_refused_by_name(tmp_path: Path) -> None:
    for name in ("a.docx", "a.csv", "a.txt.zst", "a.parquet.gz", "a", "a.gz", "txt", "a.json5"):
        assert not is_readable(tmp_path / name)
        with pytest.raises(ConfigError, match=f"{name}' has none of the endings .txt, .text"):
            kind_of(tmp_path / name)
    assert {kind_of(Path(f"a.b{ending}".upper())) for ending in ENDINGS} == {*TEXT, *JSON, *PARQUET}


LINES = '{"text": "good"}\n\n'  # the complaint is about line 3
MISTAKES = {
    "not json": ('{"text": "a",}', "line 3 of '.*' is not JSON \\("),
    "long number": (
        '{"text": "a", "id": ' + "1" * 5000 + "}",
        "line 3 of '.*' is not JSON \\(Exceeds the limit",
    ),
    "no object": (
        '"just a string"',
        "line 3 of '.*' is not a JSON object with text in the field 'text', but a str",
    ),
    "list": (
        '[{"text": 1}]',
        "line 3 of '.*' is not a JSON object with text in the field 'text', which holds 1",
    ),
    "no field": (
        '{"prompt": "a", "answer": "b"}',
        "line 3 of '.*' has no field 'text' but prompt, answer; .* text_field",
    ),
    "null": (
        '{"text": null}',
        "line 3 of '.*' is not a JSON object with text in the field 'text', which holds null",
    ),
    "empty chat": (
        '{"messages": []}',
        "line 3 of '.*' holds no list of messages but \\[\\]; fix it",
    ),
    "chat without roles": (
        '{"conversations": [{"human": "hi"}]}',
        'line 3 of \'.*\' has a message without role and content .or from and value.: ."human": "hi".',
    ),
    "surrogate in a chat": (
        '{"messages": [{"role": "user", "content": "a \\ud83d b"}]}',
        "line 3 of '.*' has half a character in the field 'messages'",
    ),
    "surrogate": ('{"text": "a \\ud83d b"}', "line 3 of '.*' has half a character in the field 'text'"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_in_json_are_told_with_their_line(name: str, tmp_path: Path) -> None:
    line, message = MISTAKES[name]
    (tmp_path / "a.jsonl").write_text(LINES + line + "\n" + LINES)
    (tmp_path / "a.json").write_text(f'[\n{{"text": "good"}},\n{line},\n{{"text": "good"}}]')
    names = ["a.jsonl"] if name == "list" else ["a.jsonl", "a.json"]
    for file in names:
        with pytest.raises(ConfigError, match=message) as caught:
            read(tmp_path / file)
        assert "\n" not in str(caught.value)
        str(caught.value).encode()  # it can be printed


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('[\n{"text": "a"}\n{"text": "b"}]', 3),
        ('[{"text": "a"},\n\n', 3),
        ('[{"text": "a"}]\n{"text": "b"}', 2),
        ('\n[{"text": "a"\n', 3),
    ],
)
def test_broken_arrays_are_told_with_their_line(text: str, line: int, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ConfigError, match=f"line {line} of .* is not JSON"):
        read(tmp_path / "a.json")


@pytest.mark.parametrize(
    "text",
    ['{"text": "a"}\n{"text": "b"}', '\n [{"text": "a"}]', '[\n  {"text": "a"}\n]', "{\n", '["a", "b"]'],
)
def test_json_is_not_read_as_prose(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(
        ConfigError,
        match="line [12] of .* begins like JSON, but the name says plain text; .* .jsonl, .ndjson, .json",
    ):
        read(tmp_path / "a.txt")


@pytest.mark.parametrize("size", [1, 7, 1 << 16])
@pytest.mark.parametrize("indent", [None, 0, 3])
def test_arrays_are_read_as_far_as_needed(
    size: int, indent: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However little is read at a time, elements, their lines and what is held are right."""
    monkeypatch.setattr(records, "READ_ON", size)
    objects = [
        {"n": number, "text": f"a [{number}], {{b}}", "list": [1, {}, [-2.5e3]]} for number in range(40)
    ]
    text = json.dumps(objects, indent=indent)
    (tmp_path / "a.json").write_text(f"\n\n{text}\n\n")
    assert read(tmp_path / "a.json") == [entry["text"] for entry in objects]
    broken = text.replace('"n": 30,', '"n": 30;')
    number = 3 + broken[: broken.index(";")].count("\n")
    (tmp_path / "b.json").write_text(f"\n\n{broken}")
    documents = Source((tmp_path / "b.json",), "text").documents()
    assert [next(documents) for _ in range(30)] == [entry["text"] for entry in objects[:30]]
    with pytest.raises(ConfigError, match=f"line {number} of .* is not JSON"):
        next(documents)


def test_a_mistake_in_a_large_array_is_told_without_reading_the_rest(tmp_path: Path) -> None:
    taken = 0

    def further() -> Iterator[str]:
        nonlocal taken
        for _ in range(10_000):
            taken += 1
            yield '{"text": "good"},\n'

    array = records._Array(tmp_path / "a.json", '[{"text" "bad"},\n', 1, further())
    with pytest.raises(ConfigError, match="line 1 of .* is not JSON"):
        list(array.texts("text"))
    assert taken == 0


@pytest.mark.parametrize("ending", [".txt", ".jsonl", ".txt.gz"])
def test_what_is_not_utf8_is_told_with_its_line(ending: str, tmp_path: Path) -> None:
    begin = b'{"text": "a"}\n' if "json" in ending else b"some text\n"
    for content in ("{'text': 'café'}".encode("latin-1"), b"\xed\xa0\xbd", "text".encode("utf-16-le")):
        path = tmp_path / f"a{ending}"
        path.write_bytes(gzip.compress(begin + content) if ending.endswith(GZIP) else begin + content)
        with pytest.raises(ConfigError, match="line 2 of .* (is not UTF-8|holds a zero byte)"):
            read(path)


def test_files_that_cannot_be_read_are_one_line(tmp_path: Path) -> None:
    whole = gzip.compress("".join(f"{number}\n" for number in range(5000)).encode())
    (tmp_path / "cut.txt.gz").write_bytes(whole[:-20])
    (tmp_path / "broken.txt.gz").write_bytes(whole[:200] + b"\xff" * 200 + whole[400:])
    (tmp_path / "plain.txt.gz").write_text("no gzip")
    (tmp_path / "plain.parquet").write_text("no parquet")
    (tmp_path / "blank.txt").write_text(" \n\n")
    (tmp_path / "blank.json").write_text("[]")
    parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "numbers.parquet")
    parquet.write_table(pyarrow.table({"messages": ["x"]}), tmp_path / "chat.parquet")
    cases = {
        "cut.txt.gz": "cannot be read after line", "broken.txt.gz": "cannot be read after line",
        "plain.txt.gz": "cannot be read after line 0",
        "plain.parquet": "cannot be read as parquet", "blank.txt": "holds no text", "blank.json": "holds no text",
        "numbers.parquet": "column 'text' of '.*' holds int64, not text", "chat.parquet": "has no column 'text' but messages",
    }  # fmt: skip
    for name, message in cases.items():
        with pytest.raises(ConfigError, match=message) as caught:
            read(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_only_what_is_asked_for_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b"}\nnonsense\n')
    source = Source((tmp_path / "a.jsonl",), "text", num_documents=2)
    assert list(source.documents()) == ["a", "b"]
    (tmp_path / "b.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    assert source.sha256() == Source((tmp_path / "b.jsonl",), "text").sha256()
