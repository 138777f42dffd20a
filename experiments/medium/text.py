"""Text for the medium model, from documentation packages of Debian: one JSON-lines file for each package.

Run:  apt-get install (or download, and unpack with dpkg-deb) the packages named below, then
      python -m experiments.medium.text --output outputs/medium/text
Out:  <package>.jsonl, a page of documentation a line, and sources.json with names, licences and sizes.

Only what is text on a page is kept: no navigation, no scripts, no page that was seen before.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

SHORTEST = 500  # characters: what is shorter is an index or a redirection
SKIPPED = {"script", "style", "nav", "footer", "header", "head", "aside", "button", "form"}
BLOCKS = {
    "p", "div", "section", "article", "li", "ul", "ol", "dl", "dt", "dd", "tr", "table", "pre", "br",
    "h1", "h2", "h3", "h4", "h5", "h6",
}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """A package, its licence, and where its pages lie under the root."""

    package: str
    licence: str
    folder: str
    pattern: str = "**/*.html"
    is_kept_out: bool = False  # nobody trains on it: out-of-domain text for measuring


SOURCES = (
    Source("python3.11-doc", "PSF-2.0", "usr/share/doc/python3.11/html"),
    Source("postgresql-doc-15", "PostgreSQL", "usr/share/doc/postgresql-doc-15/html"),
    Source("python-django-doc", "BSD-3-Clause", "usr/share/doc/python-django-doc/html"),
    Source("python-scipy-doc", "BSD-3-Clause", "usr/share/doc/python-scipy-doc/html"),
    Source("python-pandas-doc", "BSD-3-Clause", "usr/share/doc/python-pandas-doc/html"),
    Source("rust-doc", "MIT or Apache-2.0", "usr/share/doc/rust-doc/html/std"),
    Source("perl-doc", "GPL-1+ or Artistic", "usr/share/perl", "**/*.pod"),
    Source("git-doc", "GPL-2", "usr/share/doc/git-doc"),
    Source("debian-policy", "GPL-2+", "usr/share/doc/debian-policy"),
    Source("developers-reference", "GPL-2+", "usr/share/developers-reference"),
    Source("sqlite3-doc", "public domain", "usr/share/doc/sqlite3", is_kept_out=True),
)


class _Page(HTMLParser):
    """Collects the text of a page, a line for each block."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._skipped: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in SKIPPED or dict(attrs).get("role") == "navigation":
            self._skipped.append(tag)
        elif tag in BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        if self._skipped and tag == self._skipped[-1]:
            self._skipped.pop()
        elif tag in BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self._skipped:
            self.parts.append(data)


def text_of(content: str, suffix: str) -> str:
    """A page's text: HTML without its tags, anything else as it is."""
    if suffix == ".html":
        page = _Page()
        page.feed(content)
        content = "".join(page.parts)
    lines = [line.rstrip() for line in content.splitlines()]
    kept = [line for number, line in enumerate(lines) if line or (number and lines[number - 1])]
    return "\n".join(kept).strip()


def documents(source: Source, root: Path) -> Iterator[str]:
    """The pages of a package, in the order of their paths."""
    for path in sorted((root / source.folder).glob(source.pattern)):
        if path.is_file() and "_sources" not in path.parts:
            text = text_of(path.read_text(errors="replace"), path.suffix)
            if len(text) >= SHORTEST:
                yield text


def collect(root: Path, output: Path) -> dict[str, dict[str, object]]:
    """Write each package's pages, and say what they are.

    Raises:
        SystemExit: a package is not there.
    """
    missing = [source.package for source in SOURCES if not (root / source.folder).is_dir()]
    if missing:
        raise SystemExit(f"under {root} these packages are missing, install them: {' '.join(missing)}")
    output.mkdir(parents=True, exist_ok=True)
    seen: set[str] = set()
    about: dict[str, dict[str, object]] = {}
    for source in SOURCES:
        texts = list(_new(documents(source, root), seen))
        lines = [json.dumps({"text": text}) + "\n" for text in texts]
        (output / f"{source.package}.jsonl").write_text("".join(lines))
        about[source.package] = {
            "licence": source.licence,
            "documents": len(texts),
            "characters": sum(map(len, texts)),
            "kept_out": source.is_kept_out,
        }
    (output / "sources.json").write_text(json.dumps(about, indent=2) + "\n")
    return about


def _new(texts: Iterable[str], seen: set[str]) -> Iterator[str]:
    """Those that were not seen before."""
    for text in texts:
        digest = hashlib.sha256(text.encode()).hexdigest()
        if digest not in seen:
            seen.add(digest)
            yield text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, default=Path("/"), help="where the packages are unpacked")
    parser.add_argument("--output", type=Path, default=Path("outputs/medium/text"))
    arguments = parser.parse_args()
    for package, facts in collect(arguments.root, arguments.output).items():
        print(package, facts)


if __name__ == "__main__":
    main()
