"""Every operation on files is refused in turn, with every code: one line each, and nothing is lost."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from tests.store.mutations import STEPS
from tests.store.refusals import check_refusals

pytestmark = pytest.mark.faults


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("step", [3, 4, 5])
def test_a_refusal_at_any_moment_costs_nothing_that_was_finished(
    tmp_path: Path, number: int, step: int
) -> None:
    check_refusals(tmp_path, number, STEPS[step])
