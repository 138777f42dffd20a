"""Whatever is done to an artifact is noticed; it is moved aside and made again (more in tests/faults)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.store.mutations import KINDS, check_damage, data_of, make_all


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pristine") / "store"
    assert len(make_all(root)) == 12 and all(artifact.cached for artifact in make_all(root))
    assert len(data_of(root)) == 24
    return root


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_noticed_kept_and_made_good(pristine: Path, tmp_path: Path, kind: str) -> None:
    check_damage(pristine, tmp_path / "store", kind, seed=0)
