"""Chats: found in every format, hashed by their messages, written by the tokenizer's template, clearly refused."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet
from transformers import PreTrainedTokenizerFast

from heapr.errors import ConfigError
from heapr.text.chat import Conversation, as_text
from heapr.text.corpora import TextFiles
from heapr.text.windows import draw, tokenize
from tests.experiment import cached_stages, run_in, write_model
from tests.tiny import byte_tokenizer

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
CHATS = [
    [{"role": "user", "content": "Héllo"}, {"role": "assistant", "content": "Hi."}],
    [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Who?"}],
]
WRITTEN = ["<user>Héllo<assistant>Hi.", "<system>Be kind.<user>Who?"]


def with_template(template: str | dict[str, str] | None = TEMPLATE) -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def shared(chat: list[dict[str, str]]) -> list[dict[str, str]]:
    """The same in the form of ShareGPT."""
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": names[turn["role"]], "value": turn["content"]} for turn in chat]


def write_every_form(folder: Path) -> list[Path]:
    lines = [json.dumps({"messages": chat, "id": 1}) for chat in CHATS]
    (folder / "a.jsonl").write_text("\n".join(lines))
    (folder / "b.json").write_text(json.dumps([{"conversations": shared(chat)} for chat in CHATS], indent=1))
    rows = [[{"name": None, **turn} for turn in chat] for chat in CHATS]
    parquet.write_table(pyarrow.table({"n": [1, 2], "messages": rows}), folder / "c.parquet")
    return [folder / name for name in ("a.jsonl", "b.json", "c.parquet")]


def test_one_chat_in_every_form_is_one_document(tmp_path: Path) -> None:
    corpora = [TextFiles([str(path)], split="all") for path in write_every_form(tmp_path)]
    for corpus in corpora:
        documents = list(corpus.documents())
        assert [json.loads(document) for document in documents] == CHATS
        assert list(as_text(documents, with_template(), corpus="x")) == WRITTEN
    assert len({corpus.identity()["sha256"] for corpus in corpora}) == 1
    named = TextFiles([str(tmp_path / "a.jsonl")], split="all", text_field="messages")
    assert named.identity() == corpora[0].identity()


def test_tokens_are_those_of_the_written_chats(tmp_path: Path) -> None:
    path, *_ = write_every_form(tmp_path)
    corpus, tokenizer = TextFiles([str(path)], split="all"), with_template()
    expected = tokenizer("\n\n".join(WRITTEN))["input_ids"]
    assert tokenize(corpus, tokenizer).tolist() == expected
    # Documents are drawn by the length of what is written, not by that of its JSON.
    assert tokenize(corpus, tokenizer, max_characters=len("".join(WRITTEN))).tolist() == expected
    assert draw(corpus, tokenizer, length=10, num_samples=2, seed=0).ids_NW.shape == (2, 10)


def test_text_and_chats_of_one_file(tmp_path: Path) -> None:
    lines = [
        '{"text": "plain {{ m }}"}',
        json.dumps({"messages": CHATS[0]}),
        '{"text": "more", "messages": []}',
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    documents = list(TextFiles([str(tmp_path / "a.jsonl")], split="all").documents())
    assert [isinstance(document, Conversation) for document in documents] == [False, True, False]
    assert list(as_text(documents, with_template(), corpus="x")) == ["plain {{ m }}", WRITTEN[0], "more"]


def test_a_template_that_prints_the_date_always_writes_the_same() -> None:
    template = "{{ strftime_now('%Y-%m-%d') }} " + TEMPLATE
    (written,) = as_text([Conversation(json.dumps(CHATS[0]))], with_template(template), corpus="x")
    assert written == f"2026-01-01 {WRITTEN[0]}"


def test_of_several_templates_the_default_one_writes() -> None:
    tokenizer = with_template({"default": TEMPLATE, "rag": "{{ nothing.at.all }}"})
    assert list(as_text([Conversation(json.dumps(CHATS[0]))], tokenizer, corpus="x")) == WRITTEN[:1]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "conversation 2 of corpus 'mine' cannot become text, .* has no chat template"),
        ("{{ raise_exception('roles must\nalternate') }}", r"conversation 2 .* \(roles must"),
        ("{{ messages[0].a.b }}", "conversation 2 of corpus 'mine' does not fit the chat template"),
        ("{% if %}", "conversation 2 of corpus 'mine' does not fit the chat template"),
        ({"a": TEMPLATE, "b": TEMPLATE}, "conversation 2 .* does not fit .*default"),
    ],
)
def test_what_cannot_be_written_is_refused_in_one_line(
    template: str | dict[str, str] | None, message: str
) -> None:
    documents = ["text", Conversation(json.dumps(CHATS[0]))]
    with pytest.raises(ConfigError, match=message) as caught:
        list(as_text(documents, with_template(template), corpus="mine"))
    assert "\n" not in str(caught.value)


def test_a_run_calibrates_on_chats_and_another_template_is_another_model(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    chat = json.dumps({"messages": [{"role": "user", "content": "How many things? " * 4}, CHATS[0][1]]})
    lines = [chat.replace("How", f"{number} how") for number in range(20)]
    (tmp_path / "chats.jsonl").write_text("\n".join(lines))
    settings = [
        "model=hf", f"model.path={folder}", "model.dtype=float32", "evaluation=none", "pruning.save_checkpoint=false",
        "calibration=text_files", f"calibration.corpus.paths=[{tmp_path / 'chats.jsonl'}]",
        "calibration.num_samples=4", "calibration.sequence_length=32",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="conversation 1 of corpus 'text_files' cannot become text"):
        run_in(tmp_path, *settings)
    for template, is_cached in ((TEMPLATE, False), (TEMPLATE, True), ("{{ messages[0].content }}", False)):
        (folder / "chat_template.jinja").write_text(template)
        assert cached_stages(run_in(tmp_path, *settings))["calibrate"] is is_cached
