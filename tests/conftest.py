"""Shared fixtures: seeded tiny models and token batches."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

os.environ["OMP_NUM_THREADS"] = (
    "1"  # models are tiny, and tests run side by side; also for the processes that tests start
)
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach for the network
os.environ.pop("WANDB_API_KEY", None)
os.environ["WANDB_MODE"] = "offline"

import pytest

# Libraries are imported where they are needed, because the process that hands tests to others needs none.
if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from heapr.model.moe import MoEModel


def pytest_collectstart() -> None:
    import torch

    if not torch.cuda.is_available():
        # kernels are run in Python; read when transformers imports Triton
        os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session", autouse=True)
def wandb_copies_tables_to(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["WANDB_DATA_DIR"] = str(tmp_path_factory.mktemp("wandb"))


@pytest.fixture(scope="session", autouse=True)
def lm_eval_does_not_describe_the_machine() -> Iterator[None]:
    """It asks compilers, drivers and package managers after every task, for seconds, for a description that
    nothing reads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.utils.collect_env.get_pretty_env_info", str)
        yield


@pytest.fixture
def causal_lm() -> PreTrainedModel:
    from tests.tiny import tiny_qwen3_moe

    return tiny_qwen3_moe()


@pytest.fixture
def model(causal_lm: PreTrainedModel) -> MoEModel:
    from heapr.model.moe import MoEModel

    return MoEModel(causal_lm)


@pytest.fixture
def ids_NW() -> Tensor:
    from tests.tiny import tiny_ids

    return tiny_ids(num_sequences=8, length=12)


def pytest_runtest_setup(item: pytest.Item) -> None:
    import torch

    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
