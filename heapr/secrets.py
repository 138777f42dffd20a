"""Secrets: what looks like a token, key or password must not get into anything that is written.

In: text, or a configuration. Out: what kind of secret it holds, or the text without it. What is compared are
the values of environment variables with telling names, well-known forms of tokens, and URLs with a password.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from heapr.errors import ConfigError

# Names of environment variables whose values are secret.
TELLING = re.compile(r"(^|_)(TOKEN|API_?KEY|KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS?)(_|$)", re.IGNORECASE)
SHORTEST = 8  # letters; shorter values of environment variables are in any text
FORMS = (
    ("a token of Hugging Face", re.compile(r"\b(hf|api_org)_[A-Za-z0-9]{20,}")),
    ("a token of GitHub", re.compile(r"\b(gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,})")),
    ("a token of wandb", re.compile(r"\bwandb_v\d_\w{20,}|\blocal-[0-9a-f]{40}\b")),
    ("a key", re.compile(r"\b(sk-[\w-]{20,}|AKIA[0-9A-Z]{16}|AIza[\w-]{30,})")),
    ("a URL with a password", re.compile(r"(?<=://)[^\s/:@'\"]*:[^\s/@'\"]+(?=@)")),
    ("a URL with a password", re.compile(r"(?<=://)[^\s/:@'\"]{20,}(?=@)")),
    (
        "a URL with a token",
        re.compile(r"(?<=[?&])(token|access_token|api_?key|key|secret|password|signature)=[^\s&'\"]+", re.I),
    ),
)
HIDDEN = "***"


def find_secret(text: str) -> str | None:
    """What kind of secret a text holds, without the secret itself; None if it holds none."""
    for variable, value in _secret_variables():
        if value in text:
            return f"the value of the environment variable {variable}"
    for kind, form in FORMS:
        if form.search(text):
            return kind
    return None


def without_secrets(text: str) -> str:
    """The text with *** in place of every secret."""
    for _, value in _secret_variables():
        text = text.replace(value, HIDDEN)
    for _, form in FORMS:
        text = form.sub(HIDDEN, text)
    return text


def refuse_secrets(value: Any, where: str) -> None:
    """Check that no text in a configuration, keys included, holds a secret.

    Args:
        value: JSON types.
        where: its place, for the message.

    Raises:
        ConfigError: one does; the message does not repeat it.
    """
    for place, text in _texts(value, where):
        kind = find_secret(text)
        if kind is not None:
            raise ConfigError(
                f"{without_secrets(place)} holds {kind}, and whatever a run is given is recorded with its"
                " results; leave it out, and let the library find it in the environment (HF_TOKEN,"
                " WANDB_API_KEY)"
            )


class Formatter(logging.Formatter):
    """Formats log records, stack traces included, with *** in place of every secret."""

    def format(self, record: logging.LogRecord) -> str:
        return without_secrets(super().format(record))


def _secret_variables() -> Iterator[tuple[str, str]]:
    """Names and values of the environment variables that are secret."""
    for name, value in os.environ.items():
        if len(value) >= SHORTEST and TELLING.search(name):
            yield name, value


def _texts(value: Any, where: str) -> Iterator[tuple[str, str]]:
    """Every text of a configuration with its place; a key is a text too."""
    if isinstance(value, str):
        yield where, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield where, str(key)
            yield from _texts(item, f"{where}.{key}" if where else str(key))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item, where)
