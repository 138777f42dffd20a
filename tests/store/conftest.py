"""Tests of the store make hundreds of artifacts and ask git once less for each."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from heapr.store import manifest


@pytest.fixture(scope="module", autouse=True)
def git_is_not_asked() -> Iterator[None]:
    """Starting a process takes longer than making a tiny artifact."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifest, "_git_commit", lambda: None)
        yield
