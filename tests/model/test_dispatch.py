"""Forwards of the experts nest: what was there inside, outside, and in another model is there again."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor
from transformers import PreTrainedModel

from heapr.errors import ConfigError
from heapr.model.experts.dispatch import observe_experts, skip_experts, use_heapr_experts
from heapr.model.experts.layout import Experts
from heapr.model.experts.loop import run_experts
from heapr.model.moe import MoEModel
from heapr.pruning.surgery import remove
from heapr.types import Plan
from tests.tiny import tiny_ids, tiny_model

IDS_NW = tiny_ids(2, 9)
STORED = ("qwen3_moe", "llama4", "ragged")  # behind transformers' experts interface, outside of it, ours


def stored(how: str) -> MoEModel:
    if how != "ragged":
        return MoEModel(tiny_model(how))
    model = MoEModel(tiny_model("qwen3_moe"))
    remove(model, Plan(layers={layer.index: torch.arange(8).expand(4, 8) < 5 for layer in model.layers}))
    return model


def logits(model: MoEModel) -> Tensor:
    with torch.no_grad():
        return model.model(input_ids=IDS_NW, use_cache=False).logits


class Forward:
    """The loop, counting its calls."""

    def __init__(self) -> None:
        self.num_calls = 0

    def __call__(self, experts: Experts, hidden_TD: Tensor, *routing: Tensor) -> Tensor:
        self.num_calls += 1
        return run_experts(experts, hidden_TD, *routing)

    def calls(self, model: MoEModel) -> int:
        """During one pass of the model."""
        before = self.num_calls
        logits(model)
        return self.num_calls - before


@pytest.mark.parametrize("how", STORED)
def test_an_inner_use_gives_the_outer_forward_back(how: str) -> None:
    model = stored(how)
    outer, inner, layers = Forward(), Forward(), len(model.layers)
    with use_heapr_experts(model.model, outer):
        assert outer.calls(model) == layers
        with use_heapr_experts(model.model, inner):
            assert (inner.calls(model), outer.calls(model)) == (layers, 0)
            with skip_experts(model.model):
                assert (inner.calls(model), outer.calls(model)) == (0, 0)
            assert (inner.calls(model), outer.calls(model)) == (layers, 0)
        assert (inner.calls(model), outer.calls(model)) == (0, layers)
    assert (inner.calls(model), outer.calls(model)) == (0, 0)


@pytest.mark.parametrize("how", STORED)
def test_models_do_not_share_their_forward(how: str) -> None:
    first, second = stored(how), stored(how)
    of_first, of_second, layers = Forward(), Forward(), len(first.layers)
    with use_heapr_experts(first.model, of_first), use_heapr_experts(second.model, of_second):
        assert (of_first.calls(first), of_second.calls(first)) == (layers, 0)
        assert (of_first.calls(second), of_second.calls(second)) == (0, layers)


@pytest.mark.parametrize("how", STORED)
def test_an_inner_observer_gives_the_outer_one_back(how: str) -> None:
    model = stored(how)
    seen: list[str] = []

    def named(name: str) -> Callable[..., None]:
        return lambda *_: seen.append(name)

    experts = model.layers[0].experts
    with observe_experts(model.model, [(experts, named("outer"))]):
        with observe_experts(model.model, [(experts, named("inner"))]):
            logits(model)
        logits(model)
    logits(model)
    assert seen[:1] == ["inner"] and seen[-1:] == ["outer"] and set(seen[: seen.index("outer")]) == {"inner"}


@pytest.mark.parametrize("how", STORED)
def test_a_device_map_still_brings_the_weights(how: str) -> None:
    model, run = stored(how), Forward()
    expected = logits(model)
    for layer in model.layers:
        cpu_offload(layer.experts, execution_device=torch.device("cpu"))
    with use_heapr_experts(model.model, run):
        torch.testing.assert_close(logits(model), expected)
    assert run.num_calls == len(model.layers)


@pytest.mark.parametrize("how", STORED)
def test_an_error_inside_leaves_the_model_as_it_was(how: str) -> None:
    model = stored(how)
    expected, chosen = logits(model), model.model.get_experts_implementation()
    before = [dict(vars(layer.experts)) for layer in model.layers]
    with (
        pytest.raises(KeyError),
        observe_experts(model.model, [(layer.experts, print) for layer in model.layers], Forward()),
    ):
        raise KeyError
    assert [vars(layer.experts) for layer in model.layers] == before
    assert model.model.get_experts_implementation() == chosen and torch.equal(logits(model), expected)


def test_experts_that_keep_their_implementation_are_refused(
    causal_lm: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(causal_lm), "_can_set_experts_implementation_cached_value", False, raising=False)
    before = dict(vars(MoEModel(causal_lm).layers[0].experts))
    with (
        pytest.raises(ConfigError, match="missing capability: experts whose implementation cannot be chosen"),
        use_heapr_experts(causal_lm),
    ):
        pytest.fail("the model was used")
    assert vars(MoEModel(causal_lm).layers[0].experts) == before
