"""Texts that are in memory, as a corpus.

In: documents. Out: a `Corpus`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

from heapr.errors import ConfigError


class Texts:
    """Documents that were given as strings.

    Args:
        documents: at least one of them has text.
        name: of the corpus, in metrics and messages.

    Raises:
        ConfigError: there is no text, or something else than text.
    """

    split = "all"

    def __init__(self, documents: Iterable[str], name: str = "texts") -> None:
        self.name = name
        self._documents = list(documents)
        for number, document in enumerate(self._documents):
            if not isinstance(document, str):
                raise ConfigError(
                    f"texts[{number}] is a {type(document).__name__}, not a string; give a list of documents,"
                    " each a string"
                )
        if not any(document.strip() for document in self._documents):
            raise ConfigError(
                f"texts are empty ({len(self._documents)} documents without a word); give a list of documents"
            )

    def documents(self) -> Sequence[str]:
        """The documents, as they were given."""
        return self._documents

    def identity(self) -> dict[str, str]:
        """A fingerprint of all documents."""
        digest = hashlib.sha256()
        for document in self._documents:
            content = document.encode("utf-8", errors="surrogatepass")
            digest.update(f"{len(content)}\0".encode() + content)
        return {"corpus": self.name, "split": self.split, "sha256": digest.hexdigest()}
