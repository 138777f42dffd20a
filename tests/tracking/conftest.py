"""wandb keeps a process of its own and what the last run told it; each file of tests begins without."""

from __future__ import annotations

import pytest
import wandb


@pytest.fixture(scope="module", autouse=True)
def _fresh_wandb() -> None:
    wandb.teardown()
