"""The command that trained the built-in model: seeded, and resumed equals uninterrupted."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor


@pytest.fixture(scope="module")
def training() -> ModuleType:
    """The script as a module."""
    path = Path(__file__).parents[1] / "experiments" / "builtin_models" / "train.py"
    spec = importlib.util.spec_from_file_location("builtin_training", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["builtin_training"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def document_ids() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 2048, (20,), generator=generator) for _ in range(12)]


def steps(training: ModuleType, state: object, document_ids: list[Tensor], until: int) -> None:
    while state.step < until:
        training.train_step(state, training.sample_batch(document_ids, state.recipe, state.step), state.recipe)


def test_resumed_equals_uninterrupted(training: ModuleType, document_ids: list[Tensor], tmp_path: Path) -> None:
    recipe = training.Recipe(model="qwen3_moe_tiny", num_steps=4, batch_size=2, sequence_length=16, num_warmup_steps=1)
    whole, first, second = (training.TrainingState(recipe) for _ in range(3))
    steps(training, whole, document_ids, until=4)
    steps(training, first, document_ids, until=2)
    first.save(tmp_path)
    second.load(tmp_path)
    assert second.step == 2
    steps(training, second, document_ids, until=4)
    for name in ("model", "average"):
        expected, got = getattr(whole, name), getattr(second, name)
        assert all(torch.equal(a, b) for a, b in zip(expected.parameters(), got.parameters(), strict=True))
    assert not torch.equal(whole.model.lm_head.weight, whole.average.lm_head.weight)


def test_another_recipe_does_not_go_on_from_it(training: ModuleType, document_ids: list[Tensor], tmp_path: Path) -> None:
    recipe = training.Recipe(model="qwen3_moe_tiny", num_steps=4, batch_size=2, sequence_length=16)
    state = training.TrainingState(recipe)
    steps(training, state, document_ids, until=1)
    state.save(tmp_path)
    with pytest.raises(SystemExit, match="another recipe"):
        training.TrainingState(training.Recipe(model="qwen3_moe_tiny", num_steps=5)).load(tmp_path)
