"""The command that trained the built-in models: seeded, resumed equals uninterrupted, and every family's load
is balanced."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

BUILTIN = ("qwen3_moe_tiny", "deepseek_moe_tiny")


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
        training.train_step(
            state, training.sample_batch(document_ids, state.schedule, state.step), state.schedule
        )


@pytest.mark.parametrize("name", BUILTIN)
def test_resumed_equals_uninterrupted(
    training: ModuleType, name: str, document_ids: list[Tensor], tmp_path: Path
) -> None:
    schedule = training.Schedule(
        model=name, num_steps=4, batch_size=2, sequence_length=16, num_warmup_steps=1
    )
    whole, first, second = (training.TrainingState(schedule) for _ in range(3))
    steps(training, whole, document_ids, until=4)
    steps(training, first, document_ids, until=2)
    first.save(tmp_path)
    second.load(tmp_path)
    assert second.step == 2
    steps(training, second, document_ids, until=4)
    for part in ("model", "average"):
        expected, got = getattr(whole, part), getattr(second, part)
        assert all(torch.equal(a, b) for a, b in zip(expected.parameters(), got.parameters(), strict=True))
    assert not torch.equal(whole.model.lm_head.weight, whole.average.lm_head.weight)


def test_another_schedule_does_not_go_on_from_it(
    training: ModuleType, document_ids: list[Tensor], tmp_path: Path
) -> None:
    schedule = training.Schedule(model="qwen3_moe_tiny", num_steps=4, batch_size=2, sequence_length=16)
    state = training.TrainingState(schedule)
    steps(training, state, document_ids, until=1)
    state.save(tmp_path)
    with pytest.raises(SystemExit, match="another schedule"):
        training.TrainingState(training.Schedule(model="qwen3_moe_tiny", num_steps=5)).load(tmp_path)


def balance(router_logits: Tensor) -> float:
    """E sum_e f_e p_e of tokens' router logits: f_e times a token chooses expert e, p_e its mean
    probability."""
    probability_TE = router_logits.softmax(-1)
    chosen_TE = torch.zeros_like(probability_TE).scatter(1, probability_TE.topk(4).indices, 1.0)
    return 16 * sum(float(chosen_TE[:, e].mean() * probability_TE[:, e].mean()) for e in range(16))


@pytest.mark.parametrize("name", BUILTIN)
def test_the_loss_balances_the_load_of_the_experts(
    training: ModuleType, name: str, document_ids: list[Tensor]
) -> None:
    """Over all layers' tokens at once where the family's own forward adds it, layer by layer where the
    training does."""
    schedule = training.Schedule(model=name, num_steps=1, batch_size=2, sequence_length=16)
    state = training.TrainingState(schedule)
    state.model.eval()  # without dropout
    batch = training.sample_batch(document_ids, schedule, step=0)
    with torch.no_grad():
        outputs = state.model(input_ids=batch, output_router_logits=True)
    cross_entropy = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
    balanced_together = (
        [torch.cat(outputs.router_logits)] if name == "qwen3_moe_tiny" else outputs.router_logits
    )
    expected = float(cross_entropy) + 0.01 * sum(map(balance, balanced_together))
    assert training.train_step(state, batch, schedule) == pytest.approx(expected, rel=1e-5)


def test_the_card_tells_the_architecture(training: ModuleType) -> None:
    described = {name: training.describe(training.build_model(name)) for name in BUILTIN}
    assert described == {
        "qwen3_moe_tiny": "4 layers x 16 experts x 64 atomic experts, top-4, 2.0 million parameters",
        "deepseek_moe_tiny": (
            "4 layers x 16 experts x 48 atomic experts, top-4, beside 2 shared experts, after 1 dense layer, "
            "1.9 million parameters"
        ),
    }


def test_an_unknown_name_is_refused_with_the_known_ones(training: ModuleType) -> None:
    with pytest.raises(SystemExit, match="'nothing'; known: qwen3_moe_tiny, deepseek_moe_tiny"):
        training.build_model("nothing")
