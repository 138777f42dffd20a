"""Every Mixture-of-Experts family of the installed transformers is supported, or refused for a known
reason."""

from __future__ import annotations

import pytest
import transformers

from tests.model.support import DOCUMENT, FOLDERS, families_of_transformers, row_of, table
from tests.tiny import FAMILIES


def test_every_family_is_tested_or_has_a_reason() -> None:
    families = families_of_transformers()
    assert len(families) > 50
    others = families.keys() - set(FAMILIES) - set(FOLDERS)
    unknown = [
        family for family in others if row_of(family, families[family]).supported.startswith("not known")
    ]
    assert not unknown, f"no tiny model in tests/tiny.py for {unknown}"
    assert set(FAMILIES) - set(families) == {"deepseek", "llama4"}  # ours, and outside the interface


@pytest.mark.slow
def test_every_family_is_supported_or_has_a_reason() -> None:
    families = families_of_transformers()
    unknown = [
        family for family in families if row_of(family, families[family]).supported.startswith("not known")
    ]
    assert not unknown


@pytest.mark.slow
def test_the_table_in_the_docs_is_up_to_date() -> None:
    if f"transformers {transformers.__version__} " not in DOCUMENT.read_text():
        pytest.skip(f"docs/models.md is of another version of transformers than {transformers.__version__}")
    assert DOCUMENT.read_text() == table(), "run python -m tests.model.support"
