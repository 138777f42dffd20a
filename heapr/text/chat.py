"""Conversations: documents that become text through the chat template of a model's tokenizer.

In: the messages of a row of chat data. Out: a `Conversation`, and its text once there is a tokenizer. A
message has the form of most chat templates, {"role": "user", "content": "..."}, or that of ShareGPT,
{"from": "human", "value": "..."}.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from heapr.errors import ConfigError
from heapr.words import first_line

CHAT_FIELDS = ("messages", "conversations", "conversation")
ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names, and those of chat templates
# Some templates print today's date. Put before them, this makes it always the same, and so the text.
DATE_FUNCTION = "strftime_now"
SAME_DATE = f"{{%- macro {DATE_FUNCTION}(format) -%}}2026-01-01{{%- endmacro %}}"
UNFIT = (TemplateError, ValueError, TypeError, KeyError, AttributeError)  # what a template may raise


class Conversation(str):
    """The messages of a chat as canonical JSON, by which it is hashed; `as_text` turns it into text."""

    __slots__ = ()


def chat_field(field: str, known: Collection[str]) -> str | None:
    """The field of a row that holds its chat: the wanted one, or another one where that is missing.

    Args:
        field: where text is wanted from.
        known: the row's fields.
    """
    if field in known:
        return field if field in CHAT_FIELDS else None
    others = [name for name in CHAT_FIELDS if name in known]
    return others[0] if others else None


def conversation(messages: Any, where: str) -> Conversation:
    """The conversation of a row.

    Args:
        messages: what the row holds.
        where: the row, for messages.

    Raises:
        ConfigError: it is not a list of messages.
    """
    if not isinstance(messages, list) or not messages:
        raise ConfigError(f"{where} holds no list of messages but {json.dumps(messages):.40}; fix it")
    turns = [_message(message, where) for message in messages]
    return Conversation(json.dumps(turns, ensure_ascii=False, sort_keys=True))


def _message(message: Any, where: str) -> dict[str, Any]:
    """A message under the names that chat templates use, without fields that hold nothing."""
    if isinstance(message, dict) and isinstance(message.get("role"), str):
        return {name: value for name, value in message.items() if value is not None}
    if isinstance(message, dict) and isinstance(message.get("from"), str) and "value" in message:
        speaker = message["from"]
        return {"role": ROLES.get(speaker, speaker), "content": message["value"]}
    shown = json.dumps(message)
    raise ConfigError(
        f"{where} has a message without role and content (or from and value): {shown:.60}; fix it"
    )


def as_text(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, *, corpus: str) -> Iterator[str]:
    """The documents, with conversations written as the chat template says.

    Args:
        documents: text, and conversations.
        tokenizer: of the model.
        corpus: its name, for messages.

    Raises:
        ConfigError: the tokenizer has no chat template, or a conversation does not fit it.
    """
    for number, document in enumerate(documents, start=1):
        if isinstance(document, Conversation):
            yield _written(document, tokenizer, f"conversation {number} of corpus '{corpus}'")
        else:
            yield document


def _written(chat: Conversation, tokenizer: PreTrainedTokenizerBase, what: str) -> str:
    if not tokenizer.chat_template:
        raise ConfigError(
            f"{what} cannot become text, because the model's tokenizer has no chat template; use the model's"
            " chat version, or write every conversation as one text"
        )
    try:
        template = tokenizer.get_chat_template()
        if DATE_FUNCTION in template:
            template = SAME_DATE + template
        text = tokenizer.apply_chat_template(json.loads(chat), chat_template=template, tokenize=False)
    except UNFIT as error:
        raise ConfigError(
            f"{what} does not fit the chat template of the model's tokenizer ({first_line(error)}); fix it or"
            " leave it out"
        ) from error
    return str(text)
